/* Attempts to become more than the instance's own uid. */
#include "hostile.h"

#include <grp.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/perf_event.h>
#include <linux/sched.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <sys/xattr.h>

/* Under the model `none` the uid is root's already; what counts is what root could do with it. */
static void become_root(char **words)
{
    char name[65];
    (void)words;
    must(setuid(0));
    must(gethostname(name, sizeof name));
    must(sethostname(name, strlen(name)));
    succeeded("is root, and may name the host");
}

static void become_another(char **words)
{
    uid_t uid = atoi(words[0]);
    must(setresuid(uid, uid, uid));
    succeeded("is uid %d", uid);
}

static void take_group(char **words)
{
    gid_t group = 0;
    (void)words;
    must(setgroups(1, &group));
    succeeded("is in root's group");
}

/* PATH: a set-uid copy of this program that somebody left there, else one of its own. */
static void execute_set_uid(char **words)
{
    if (access(words[0], F_OK) < 0)
        copy_of_itself(words[0], 04755);
    must(execve(words[0], as_reporter(), 0));
}

/* PATH: a program of the node's that has more than whoever calls it. */
static void execute(char **words)
{
    must(access(words[0], X_OK));
    pid_t child = must(fork());
    if (child == 0) {
        int null = open("/dev/null", O_RDWR);
        for (int each = 0; each < 3; each++)
            dup2(null, each);
        execve(words[0], words, 0);
        _exit(127);
    }
    int status;
    must(waitpid(child, &status, 0));
    if (status == 127 << 8)
        refused_as("ENOEXEC", words[0]);
    succeeded("ran %s", words[0]);
}

static void set_file_capability(char **words)
{
    struct vfs_cap_data all = {VFS_CAP_REVISION_2 | VFS_CAP_FLAGS_EFFECTIVE,
                               {{~0u, 0}, {0, 0}}};
    copy_of_itself(words[0], 0755);
    must(setxattr(words[0], "security.capability", &all, sizeof all, 0));
    succeeded("%s has capabilities", words[0]);
}

/* User namespaces, and what they would grant ----------------------------------------------------- */

static void user_namespace(char **words)
{
    (void)words;
    must(unshare(CLONE_NEWUSER));
    succeeded("has a user namespace");
}

static void report_clone(long pid)
{
    if (pid == 0)
        _exit(0);
    waitpid(must_be("clone", pid), 0, 0);
    succeeded("a child had a user namespace");
}

static void user_namespace_by_clone(char **words)
{
    (void)words;
    report_clone(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0));
}

static void user_namespace_by_clone3(char **words)
{
    struct clone_args asked = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
    (void)words;
    report_clone(syscall(SYS_clone3, &asked, sizeof asked));
}

static void mount_in_user_namespace(char **words)
{
    unshare(CLONE_NEWUSER);
    must(unshare(CLONE_NEWNS));
    must(mount("hostile", words[0], "tmpfs", 0, 0));
    succeeded("mounted on %s", words[0]);
}

static void network_in_user_namespace(char **words)
{
    (void)words;
    unshare(CLONE_NEWUSER);
    must(unshare(CLONE_NEWNET));
    succeeded("has a network namespace to be root in");
}

/* The kernel itself ------------------------------------------------------------------------------ */

static void load_module(char **words)
{
    char image[64] = "not a module";
    (void)words;
    must(syscall(SYS_init_module, image, sizeof image, ""));
    succeeded("loaded a module");
}

static void make_bpf_map(char **words)
{
    union bpf_attr asked = {
        .map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
    (void)words;
    must(syscall(SYS_bpf, BPF_MAP_CREATE, &asked, sizeof asked));
    succeeded("has a map");
}

static void watch_by_perf(char **words)
{
    struct perf_event_attr asked = {.type = PERF_TYPE_SOFTWARE,
                                    .size = sizeof asked,
                                    .config = PERF_COUNT_SW_TASK_CLOCK,
                                    .exclude_kernel = 1,
                                    .exclude_hv = 1};
    (void)words;
    must(syscall(SYS_perf_event_open, &asked, 0, -1, -1, 0));
    succeeded("has a performance event");
}

static void handle_faults(char **words)
{
    (void)words;
    must(syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY));
    succeeded("has a userfaultfd");
}

static void read_kernel_log(char **words)
{
    char found[256];
    (void)words;
    must(klogctl(3, found, sizeof found)); /* SYSLOG_ACTION_READ_ALL */
    succeeded("read the kernel's log");
}

/* Its own limits --------------------------------------------------------------------------------- */

static void raise_limit(char **words)
{
    struct rlimit limit;
    (void)words;
    must(getrlimit(RLIMIT_CORE, &limit));
    limit.rlim_max = RLIM_INFINITY;
    must(setrlimit(RLIMIT_CORE, &limit));
    must(getrlimit(RLIMIT_NICE, &limit));
    limit.rlim_max += 1;
    must(setrlimit(RLIMIT_NICE, &limit));
    succeeded("raised a hard limit");
}

static void run_first(char **words)
{
    struct sched_param most = {sched_get_priority_max(SCHED_FIFO)};
    (void)words;
    must(sched_setscheduler(0, SCHED_FIFO, &most));
    succeeded("runs before everybody else");
}

const struct attack privileges[] = {
    {"become-root", become_root},
    {"become-another", become_another},
    {"take-group", take_group},
    {"execute-set-uid", execute_set_uid},
    {"execute", execute},
    {"set-file-capability", set_file_capability},
    {"user-namespace", user_namespace},
    {"user-namespace-by-clone", user_namespace_by_clone},
    {"user-namespace-by-clone3", user_namespace_by_clone3},
    {"mount-in-user-namespace", mount_in_user_namespace},
    {"network-in-user-namespace", network_in_user_namespace},
    {"load-module", load_module},
    {"make-bpf-map", make_bpf_map},
    {"watch-by-perf", watch_by_perf},
    {"handle-faults", handle_faults},
    {"read-kernel-log", read_kernel_log},
    {"raise-limit", raise_limit},
    {"run-first", run_first},
    {0},
};
