/* Attacks on whoever starts and stops instances: on its paths, its locks, the uid's next holder. */
#include "hostile.h"

#include <linux/keyctl.h>
#include <mqueue.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/xattr.h>

/* PATH...: put something else into the place of each; the most telling refusal of all. */
static void plant(char **words)
{
    int problem = 0;
    for (char **path = words; *path; path++) {
        char beside[4096];
        snprintf(beside, sizeof beside, "%s.hostile", *path);
        if (open(*path, O_WRONLY | O_TRUNC | O_NONBLOCK) >= 0)
            succeeded("rewrote %s", *path);
        problem = errno;
        if (unlink(*path) == 0 || rename(*path, beside) == 0)
            succeeded("took %s away", *path);
        if (symlink("/etc/shadow", *path) == 0 || symlink("/etc/shadow", beside) == 0)
            succeeded("made %s a symbolic link", *path);
        if (link(given[0], *path) == 0 || link(given[0], beside) == 0)
            succeeded("made %s a hard link", *path);
        if (mkfifo(*path, 0666) == 0 || mkfifo(beside, 0666) == 0)
            succeeded("made %s a FIFO", *path);
        if (chmod(*path, 0777) == 0)
            succeeded("opened %s to all", *path);
    }
    errno = problem;
    refused("plant");
}

/* PATH: hold it as its launcher would. */
static void hold_lock(char **words)
{
    int file = must(open(words[0], O_RDONLY));
    must(flock(file, LOCK_EX | LOCK_NB));
    succeeded("holds the lock of %s", words[0]);
}

/* Give back every lock that some open file has which it was given: flock(2), and fcntl(2)'s. */
static void drop_locks(char **words)
{
    struct flock all = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
    int count = 0;
    (void)words;
    for (int each = next_descriptor(-1); each >= 0; each = next_descriptor(each)) {
        flock(each, LOCK_UN);
        count += fcntl(each, F_OFD_SETLK, &all) == 0;
    }
    ready("dropped what %d descriptors held", count);
    succeeded("nothing is held");
}

/* PLACE: everything that might outlive it, under its uid. */
static void leave_behind(char **words)
{
    char path[4096];
    int count = 0;
    snprintf(path, sizeof path, "%s/set-uid", words[0]);
    count += copy_of_itself(path, 06755) == 0;
    count += syscall(SYS_add_key, "user", "left-behind", "x", 1, KEY_SPEC_USER_KEYRING) >= 0;
    long kept = syscall(SYS_keyctl, KEYCTL_GET_PERSISTENT, -1, KEY_SPEC_PROCESS_KEYRING);
    count += syscall(SYS_add_key, "user", "left-behind", "x", 1, kept) >= 0;
    count += shmget(0x1ef7, 4096, IPC_CREAT | 0600) >= 0;
    count += mq_open("/left-behind", O_RDWR | O_CREAT, 0600, 0) >= 0;
    succeeded("left %d things", count);
}

/* KEYRING: whether the key is in it, which may be searched once it is linked to. */
static int has_key(long keyring)
{
    syscall(SYS_keyctl, KEYCTL_LINK, keyring, KEY_SPEC_PROCESS_KEYRING);
    return syscall(SYS_keyctl, KEYCTL_SEARCH, keyring, "user", "left-behind", 0) >= 0;
}

/* PLACE: what an earlier holder of the uid left. */
static void find_behind(char **words)
{
    char path[4096];
    int count = 0;
    snprintf(path, sizeof path, "%s/set-uid", words[0]);
    count += access(path, F_OK) == 0;
    count += has_key(KEY_SPEC_USER_KEYRING);
    count += has_key(syscall(SYS_keyctl, KEYCTL_GET_PERSISTENT, -1, KEY_SPEC_PROCESS_KEYRING));
    count += shmget(0x1ef7, 0, 0) >= 0;
    count += mq_open("/left-behind", O_RDWR) >= 0;
    if (count == 0)
        refused_as("NONE", "nothing was left");
    succeeded("found %d things", count);
}

const struct attack launcher[] = {
    {"plant", plant},
    {"hold-lock", hold_lock},
    {"drop-locks", drop_locks},
    {"leave-behind", leave_behind},
    {"find-behind", find_behind},
    {0},
};
