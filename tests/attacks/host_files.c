/* Attacks on the node's files: what is in the tree, and ways out of it. */
#include "hostile.h"

#include <ftw.h>
#include <linux/io_uring.h>
#include <linux/keyctl.h>
#include <linux/mount.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

/* Walks: ROOT, then what may be found ------------------------------------------------------------ */

static char **expected;
static int count;

static int is_expected(const char *path)
{
    for (char **each = expected; *each; each++) {
        size_t length = strlen(*each);
        if (strncmp(*each, path, length) == 0 && (path[length] == 0 || path[length] == '/'))
            return 1;
    }
    return 0;
}

static int write_to(const char *path, const struct stat *status, int kind, struct FTW *where)
{
    char made[4096];
    (void)where;
    count++;
    if (is_expected(path) || S_ISLNK(status->st_mode) || S_ISFIFO(status->st_mode))
        return 0;
    if (kind != FTW_D && kind != FTW_DNR) {
        if (open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC) >= 0)
            succeeded("opened %s for writing", path);
        return 0;
    }
    snprintf(made, sizeof made, "%s/hostile", path);
    if (open(made, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600) >= 0) {
        unlink(made);
        succeeded("made %s", made);
    }
    if (chmod(path, 0777) == 0)
        succeeded("changed the mode of %s", path);
    return 0;
}

static int find_set_uid(const char *path, const struct stat *status, int kind, struct FTW *where)
{
    char capability[64];
    (void)where;
    count++;
    if (kind == FTW_F && (status->st_mode & (S_ISUID | S_ISGID)))
        succeeded("%s has mode %o", path, status->st_mode);
    if (kind == FTW_F && lgetxattr(path, "security.capability", capability, sizeof capability) > 0)
        succeeded("%s has capabilities", path);
    return 0;
}

static int find_device(const char *path, const struct stat *status, int kind, struct FTW *where)
{
    (void)kind, (void)where;
    count++;
    if (!is_expected(path) && (S_ISCHR(status->st_mode) || S_ISBLK(status->st_mode)))
        succeeded("%s is device %d:%d", path, major(status->st_rdev), minor(status->st_rdev));
    return 0;
}

static void walk(char **words, __nftw_func_t look)
{
    char said[64];
    expected = words + 1;
    nftw(words[0], look, 64, FTW_PHYS);
    snprintf(said, sizeof said, "among %d files", count);
    /* An empty walk would prove nothing: there is the program itself, at least. */
    refused_as(count > 5 ? "NONE" : "NOTREE", said);
}

static void walk_writable(char **words) { walk(words, write_to); }
static void walk_set_uid(char **words) { walk(words, find_set_uid); }
static void walk_devices(char **words) { walk(words, find_device); }

/* Devices and mounts: PLACE, a directory that one may write to ----------------------------------- */

static const char *in_place(const char *place, const char *name)
{
    static char path[4096];
    snprintf(path, sizeof path, "%s/%s", place, name);
    return path;
}

static void make_device(char **words)
{
    must(mknod(in_place(words[0], "mem"), S_IFCHR | 0600, makedev(1, 1)));
    succeeded("made a /dev/mem");
}

static void mount_tmpfs(char **words)
{
    must(mount("hostile", words[0], "tmpfs", 0, 0));
    succeeded("mounted on %s", words[0]);
}

static void mount_proc(char **words)
{
    must(mount("proc", words[0], "proc", 0, 0));
    succeeded("mounted on %s", words[0]);
}

static void mount_new_way(char **words)
{
    (void)words;
    must(syscall(SYS_fsopen, "tmpfs", 0));
    succeeded("has a new filesystem");
}

static void clone_tree(char **words)
{
    (void)words;
    must(syscall(SYS_open_tree, AT_FDCWD, "/", OPEN_TREE_CLONE));
    succeeded("has a copy of the tree");
}

/* Ways out: PLACE MARKER, a file outside that is not in the tree --------------------------------- */

static void climb(void)
{
    for (int each = 0; each < 64; each++)
        must(chdir(".."));
}

static void escape_chroot(char **words)
{
    const char *cell = in_place(words[0], "cell");
    int outside = must(open("/", O_RDONLY | O_DIRECTORY));
    mkdir(cell, 0700);
    must(chroot(cell));
    must(fchdir(outside));
    climb();
    must(chroot("."));
    must(open(words[1], O_RDONLY));
    succeeded("opened %s outside", words[1]);
}

static void dot_dot(char **words)
{
    climb();
    must(open(words[1] + 1, O_RDONLY));
    succeeded("opened %s outside", words[1]);
}

static void dot_dot_of_descriptors(char **words)
{
    char path[4096] = "";
    for (int each = 0; each < 64; each++)
        strcat(path, "../");
    strcat(path, words[1] + 1);
    errno = EBADF;
    for (int each = next_descriptor(-1); each >= 0; each = next_descriptor(each))
        if (openat(each, path, O_RDONLY) >= 0)
            succeeded("opened %s from descriptor %d", words[1], each);
    refused("openat");
}

/* PATH, a file that may be looked at. */
static void open_by_handle(char **words)
{
    struct {
        struct file_handle header;
        unsigned char bytes[128];
    } handle = {.header.handle_bytes = 128};
    int mount_id;
    must(name_to_handle_at(AT_FDCWD, words[0], &handle.header, &mount_id, 0));
    int there = must(open(words[0], O_RDONLY));
    must(open_by_handle_at(there, &handle.header, O_RDONLY));
    succeeded("opened %s without its path", words[0]);
}

static void make_io_uring(char **words)
{
    struct io_uring_params asked = {0};
    (void)words;
    must(syscall(SYS_io_uring_setup, 8, &asked));
    succeeded("has an io_uring");
}

/* Programs of its own ---------------------------------------------------------------------------- */

static void execute_memory(char **words)
{
    char path[64];
    (void)words;
    int memory = must(memfd_create("hostile", 0));
    int source = must(open(given[0], O_RDONLY));
    char block[65536];
    ssize_t size;
    while ((size = read(source, block, sizeof block)) > 0)
        must(write(memory, block, size));
    snprintf(path, sizeof path, "/proc/self/fd/%d", memory);
    execve(path, as_reporter(), 0);
    must(syscall(SYS_execveat, memory, "", as_reporter(), 0, AT_EMPTY_PATH));
}

static void execute_output(char **words)
{
    const char *path = in_place(words[0], "program");
    copy_of_itself(path, 0755);
    must(execve(path, as_reporter(), 0));
}

/* The kernel's keys ------------------------------------------------------------------------------ */

static void add_key(char **words)
{
    (void)words;
    must(syscall(SYS_add_key, "user", "hostile", "x", 1, KEY_SPEC_PROCESS_KEYRING));
    succeeded("has a key");
}

/* DESCRIPTION: a key that the caller's session keyring leads to (request_key(2)). DESCRIPTION login:
 * after what pam_keyinit(8) does for every user that logs in, since whoever calls this may have
 * inherited another's session keyring. A jail's is empty, and leads to no keyring of its user's. */
static void request_key(char **words)
{
    if (words[1]) {
        must(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0));
        must(syscall(SYS_keyctl, KEYCTL_LINK, KEY_SPEC_USER_KEYRING, KEY_SPEC_SESSION_KEYRING));
    }
    long key = must(syscall(SYS_request_key, "user", words[0], 0, 0));
    succeeded("found key %lx", key);
}

static void persistent_keyring(char **words)
{
    (void)words;
    must(syscall(SYS_keyctl, KEYCTL_GET_PERSISTENT, -1, KEY_SPEC_PROCESS_KEYRING));
    succeeded("has the uid's persistent keyring");
}

static void session_keyring(char **words)
{
    (void)words;
    must(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0));
    succeeded("has another session keyring");
}

const struct attack host_files[] = {
    {"walk-writable", walk_writable},
    {"walk-set-uid", walk_set_uid},
    {"walk-devices", walk_devices},
    {"make-device", make_device},
    {"mount", mount_tmpfs},
    {"mount-proc", mount_proc},
    {"mount-new-way", mount_new_way},
    {"clone-tree", clone_tree},
    {"escape-chroot", escape_chroot},
    {"dot-dot", dot_dot},
    {"dot-dot-of-descriptors", dot_dot_of_descriptors},
    {"open-by-handle", open_by_handle},
    {"make-io-uring", make_io_uring},
    {"execute-memory", execute_memory},
    {"execute-output", execute_output},
    {"add-key", add_key},
    {"request-key", request_key},
    {"persistent-keyring", persistent_keyring},
    {"session-keyring", session_keyring},
    {0},
};
