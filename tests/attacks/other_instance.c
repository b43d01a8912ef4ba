/* Attacks on another instance: its process, its files and sockets, its namespaces, its limits. */
#include "hostile.h"

#include <dirent.h>
#include <linux/keyctl.h>
#include <mqueue.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/ptrace.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>

static void signal_it(char **words)
{
    must(kill(atoi(words[0]), SIGCONT));
    succeeded("signalled process %s", words[0]);
}

static void signal_by_descriptor(char **words)
{
    int process = must(syscall(SYS_pidfd_open, atoi(words[0]), 0));
    must(syscall(SYS_pidfd_send_signal, process, SIGCONT, 0, 0));
    succeeded("signalled process %s", words[0]);
}

static void trace(char **words)
{
    must(ptrace(PTRACE_SEIZE, atoi(words[0]), 0, 0));
    succeeded("traces process %s", words[0]);
}

/* PID ADDRESS: the address of something that is mapped there. */
static void read_memory(char **words)
{
    char found[16];
    struct iovec here = {found, sizeof found};
    struct iovec there = {(void *)strtoul(words[1], 0, 16), sizeof found};
    must(process_vm_readv(atoi(words[0]), &here, 1, &there, 1, 0));
    succeeded("read 16 bytes of process %s", words[0]);
}

static void take_descriptor(char **words)
{
    int process = must(syscall(SYS_pidfd_open, atoi(words[0]), 0));
    must(syscall(SYS_pidfd_getfd, process, atoi(words[1]), 0));
    succeeded("holds its descriptor %s", words[1]);
}

/* Opening things by path: PATH, or PATH OFFSET --------------------------------------------------- */

static void read_file(char **words)
{
    char found[16];
    int file = must(open(words[0], O_RDONLY | O_NONBLOCK));
    off_t offset = words[1] ? (off_t)strtoul(words[1], 0, 16) : 0;
    must(pread(file, found, sizeof found, offset));
    succeeded("read %s", words[0]);
}

static void open_to_write(char **words)
{
    must(open(words[0], O_WRONLY | O_NONBLOCK));
    succeeded("opened %s for writing", words[0]);
}

static void list(char **words)
{
    int count = 0;
    DIR *directory = opendir(words[0]);
    if (!directory)
        refused("opendir");
    while (readdir(directory))
        count++;
    succeeded("%d entries in %s", count, words[0]);
}

static void connect_to(char **words)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int dialler = must(socket(AF_UNIX, SOCK_STREAM, 0));
    strncpy(address.sun_path, words[0], sizeof address.sun_path - 1);
    must(connect(dialler, (void *)&address, sizeof address));
    succeeded("connected to %s", words[0]);
}

static socklen_t abstract(struct sockaddr_un *address, const char *name)
{
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    strncpy(address->sun_path + 1, name, sizeof address->sun_path - 2);
    return offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name);
}

/* Whoever may joins the namespace in question first: what counts is what is done there. */
static void try_to_join(const char *namespace)
{
    int opened = open(namespace, O_RDONLY);
    if (opened >= 0)
        setns(opened, 0);
}

/* NAME NAMESPACE: an abstract socket (unix(7)), which no file's mode guards. */
static void connect_abstract(char **words)
{
    struct sockaddr_un address;
    socklen_t length = abstract(&address, words[0]);
    try_to_join(words[1]);
    int dialler = must(socket(AF_UNIX, SOCK_STREAM, 0));
    must(connect(dialler, (void *)&address, length));
    succeeded("connected to @%s", words[0]);
}

/* NAME: a socket finds abstract names where it was made, and its own monitor's was made outside. */
static void connect_abstract_by_granted(char **words)
{
    struct sockaddr_un address;
    socklen_t length = abstract(&address, words[0]);
    int problem = EBADF;
    for (int each = next_descriptor(2); each >= 0; each = next_descriptor(each)) {
        int domain = 0;
        socklen_t size = sizeof domain;
        if (getsockopt(each, SOL_SOCKET, SO_DOMAIN, &domain, &size) < 0 || domain != AF_UNIX)
            continue;
        if (connect(each, (void *)&address, length) == 0)
            succeeded("descriptor %d connected to @%s", each, words[0]);
        problem = errno;
    }
    errno = problem;
    refused("connect");
}

/* Namespaces, IPC, keys -------------------------------------------------------------------------- */

static void join_by_path(char **words)
{
    const char *kinds[] = {"net", "ipc", "uts", "pid", "cgroup", "mnt"};
    char path[64];
    for (size_t each = 0; each < sizeof kinds / sizeof *kinds; each++) {
        snprintf(path, sizeof path, "/proc/%s/ns/%s", words[0], kinds[each]);
        int namespace = open(path, O_RDONLY);
        if (namespace >= 0 && setns(namespace, 0) == 0)
            succeeded("joined its %s namespace", kinds[each]);
    }
    refused("setns");
}

static void join_by_descriptor(char **words)
{
    int process = must(syscall(SYS_pidfd_open, atoi(words[0]), 0));
    must(setns(process, CLONE_NEWNET | CLONE_NEWIPC));
    succeeded("joined namespaces of process %s", words[0]);
}

/* KEY NAMESPACE */
static void attach_shared_memory(char **words)
{
    try_to_join(words[1]);
    int segment = must(shmget(strtol(words[0], 0, 16), 0, 0));
    must((long)shmat(segment, 0, SHM_RDONLY));
    succeeded("attached segment %d", segment);
}

/* KEY NAMESPACE */
static void open_semaphore(char **words)
{
    try_to_join(words[1]);
    int set = must(semget(strtol(words[0], 0, 16), 0, 0));
    must(semctl(set, 0, GETVAL));
    succeeded("read a semaphore of set %d", set);
}

/* NAME NAMESPACE */
static void open_message_queue(char **words)
{
    try_to_join(words[1]);
    must(mq_open(words[0], O_RDWR));
    succeeded("opened the queue %s", words[0]);
}

/* DESCRIPTION: a key in the keyring of the caller's user, which all of a uid's processes share. */
static void read_key(char **words)
{
    char found[64];
    syscall(SYS_keyctl, KEYCTL_LINK, KEY_SPEC_USER_KEYRING, KEY_SPEC_PROCESS_KEYRING);
    long key = must(syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_USER_KEYRING, "user", words[0], 0));
    must(syscall(SYS_keyctl, KEYCTL_READ, key, found, sizeof found));
    succeeded("read key %lx", key);
}

/* What the kernel counts by uid: take all, and hold it while another is looked at ---------------- */

static void drain_inotify(char **words)
{
    int count = 0;
    (void)words;
    while (count < 4096 && inotify_init1(0) >= 0)
        count++;
    ready("%d inotify instances: %s", count, strerror(errno));
    succeeded("they were held");
}

static void drain_keys(char **words)
{
    char name[32];
    int count = 0;
    (void)words;
    for (; count < 4096; count++) {
        snprintf(name, sizeof name, "drain-%d", count);
        if (syscall(SYS_add_key, "user", name, "x", 1, KEY_SPEC_PROCESS_KEYRING) < 0)
            break;
    }
    ready("%d keys: %s", count, strerror(errno));
    /* The kernel collects keys when it likes, and tells nobody: the next attack wants some. */
    syscall(SYS_keyctl, KEYCTL_CLEAR, KEY_SPEC_PROCESS_KEYRING);
    while (count > 0 && syscall(SYS_add_key, "user", "one", "x", 1, KEY_SPEC_PROCESS_KEYRING) < 0)
        usleep(1000);
    succeeded("they were held");
}

static void drain_message_queues(char **words)
{
    char name[32];
    int count = 0;
    (void)words;
    for (; count < 4096; count++) {
        snprintf(name, sizeof name, "/drain-%d", count);
        if (mq_open(name, O_RDWR | O_CREAT | O_EXCL, 0600, 0) < 0)
            break;
        mq_unlink(name); /* Its memory counts for as long as it is open. */
    }
    ready("%d queues: %s", count, strerror(errno));
    succeeded("they were held");
}

/* Pending signals, which end with who they wait for. */
static void drain_signals(char **words)
{
    int count = 0;
    sigset_t queued;
    (void)words;
    sigemptyset(&queued);
    sigaddset(&queued, SIGRTMIN);
    must(sigprocmask(SIG_BLOCK, &queued, 0));
    while (count < 1 << 20 && sigqueue(getpid(), SIGRTMIN, (union sigval){0}) == 0)
        count++;
    ready("%d signals: %s", count, strerror(errno));
    succeeded("they were held");
}

/* Pages of pipe buffers: pipe(7), pipe-user-pages-soft. */
static void drain_pipes(char **words)
{
    int count = 0, line[2];
    (void)words;
    /* Those that are refused to be larger have two pages at least, past what there is for all. */
    for (int large = 1; count < 400 && pipe(line) == 0; count++)
        large = large && fcntl(line[0], F_SETPIPE_SZ, 1 << 20) >= 0;
    ready("%d pipes: %s", count, strerror(errno));
    succeeded("they were held");
}

/* Descriptors that are on their way in unix sockets: unix(7), ETOOMANYREFS. */
static void drain_inflight(char **words)
{
    enum { EACH = 250, MOST = 20 };
    int count = 0, pair[2], sent[EACH] = {0};
    char room[CMSG_SPACE(sizeof sent)] = {0};
    struct iovec one = {"x", 1};
    struct msghdr message = {
        .msg_iov = &one, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    (void)words;
    *head = (struct cmsghdr){
        .cmsg_len = CMSG_LEN(sizeof sent), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(head), sent, sizeof sent);
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    while (count < MOST && sendmsg(pair[0], &message, MSG_DONTWAIT) == 1)
        count++;
    ready("%d descriptors: %s", count * EACH, strerror(errno));
    succeeded("they were held");
}

/* COUNT: as many as the uid's other processes could then not have. COUNT all: it is bounded by
 * nothing if it gets them all, whoever notices; nobody does where the uid is root's, to whom
 * RLIMIT_NPROC doesn't apply, or is its own. */
static void drain_processes(char **words)
{
    int count = 0, most = atoi(words[0]), line[2];
    must(pipe(line));
    for (; count < most; count++) {
        pid_t child = fork();
        if (child < 0)
            break;
        if (child == 0) {
            close(line[1]); /* The end of this pipe is the end of them all. */
            _exit(read(line[0], &child, 1) != 0);
        }
    }
    if (words[1] && count == most)
        succeeded("has all %d processes", count);
    ready("%d processes: %s", count, strerror(errno));
    succeeded("they were held");
}

const struct attack other_instance[] = {
    {"signal", signal_it},
    {"signal-by-descriptor", signal_by_descriptor},
    {"trace", trace},
    {"read-memory", read_memory},
    {"take-descriptor", take_descriptor},
    {"read", read_file},
    {"open-to-write", open_to_write},
    {"list", list},
    {"connect", connect_to},
    {"connect-abstract", connect_abstract},
    {"connect-abstract-by-granted", connect_abstract_by_granted},
    {"join-by-path", join_by_path},
    {"join-by-descriptor", join_by_descriptor},
    {"attach-shared-memory", attach_shared_memory},
    {"open-semaphore", open_semaphore},
    {"open-message-queue", open_message_queue},
    {"read-key", read_key},
    {"drain-inotify", drain_inotify},
    {"drain-keys", drain_keys},
    {"drain-message-queues", drain_message_queues},
    {"drain-signals", drain_signals},
    {"drain-pipes", drain_pipes},
    {"drain-inflight", drain_inflight},
    {"drain-processes", drain_processes},
    {0},
};
