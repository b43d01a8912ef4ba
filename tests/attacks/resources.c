/* Attempts to use up what the node has. Each stops by itself at a bound that its words give. */
#include "hostile.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

static int bomb[2];

/* COUNT */
static void fork_bomb(char **words)
{
    int most = atoi(words[0]);
    must(pipe(bomb));
    for (int count = 0; count < most; count++) {
        pid_t child = fork();
        if (child < 0)
            refused("fork");
        if (child == 0) {
            close(bomb[1]); /* All end with this pipe, which is to say with their parent. */
            _exit(read(bomb[0], &child, 1) != 0);
        }
    }
    succeeded("has %d processes", most);
}

/* Each ends as soon as the next one is there, for as long as the attacker is let. */
static void fork_on(char **words)
{
    (void)words;
    if (must(fork()) == 0) {
        alarm(0);
        for (;;)
            if (fork() > 0) /* Where it is refused, it tries again. */
                _exit(0);
    }
    ready("forks on");
    succeeded("it forked on");
}

static void *map(size_t bytes, int how)
{
    void *mapped = mmap(0, bytes, PROT_READ | PROT_WRITE, how | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED)
        refused("mmap");
    return mapped;
}

/* MIB: taken by a child, so that somebody is left to have it looked into why the child ended. */
static void hog_memory(char **words)
{
    int status;
    size_t bytes = strtoul(words[0], 0, 10) << 20;
    char *hoard = map(bytes, MAP_PRIVATE);
    volatile size_t *held = map(sizeof *held, MAP_SHARED);
    pid_t child = must(fork());
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        for (; *held < bytes; *held += 4096)
            hoard[*held] = 1;
        _exit(0);
    }
    must(waitpid(child, &status, 0));
    if (status == 0)
        succeeded("has %s MiB", words[0]);
    ready("SIG%s at %zu MiB", sigabbrev_np(WTERMSIG(status)), *held >> 20);
    succeeded("it was held");
}

/* COUNT */
static void hog_descriptors(char **words)
{
    struct rlimit limit = {atoi(words[0]) + 64, atoi(words[0]) + 64};
    int most = atoi(words[0]);
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0) {
        must(getrlimit(RLIMIT_NOFILE, &limit));
        limit.rlim_cur = limit.rlim_max;
        must(setrlimit(RLIMIT_NOFILE, &limit));
    }
    for (int count = 0; count < most; count++)
        must(dup(0));
    succeeded("has %d descriptors", most);
}

/* COUNT: queues for as many requests, of those that all processes of the node share. */
static void hog_requests(char **words)
{
    unsigned long queues = 0;
    must(syscall(SYS_io_setup, atoi(words[0]), &queues));
    succeeded("has queues for %s requests", words[0]);
}

/* COUNT: what the kernel keeps for each is charged to no control group. */
static void hog_locks(char **words)
{
    int most = atoi(words[0]), file = must(memfd_create("locked", 0));
    for (int each = 0; each < most; each++) {
        /* Two bytes apart, or they become one; and from the end, where the kernel searches least. */
        struct flock one = {
            .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 2L * (most - each), .l_len = 1};
        must(fcntl(file, each % 2 ? F_SETLK : F_OFD_SETLK, &one));
    }
    succeeded("has %d locks", most);
}

/* PLACE MIB */
static void fill(char **words)
{
    static char block[1 << 16];
    char path[4096];
    snprintf(path, sizeof path, "%s/filler", words[0]);
    int file = must(open(path, O_WRONLY | O_CREAT, 0600));
    unlink(path);
    memset(block, 'x', sizeof block);
    for (size_t left = strtoul(words[1], 0, 10) << 20, sent; left > 0; left -= sent)
        sent = must(write(file, block, sizeof block));
    succeeded("filled %s MiB", words[1]);
}

/* PLACE COUNT */
static void fill_with_files(char **words)
{
    char path[4096];
    int result = 0, number = 0, most = atoi(words[1]);
    for (; number < most && result >= 0; number++) {
        snprintf(path, sizeof path, "%s/file%d", words[0], number);
        result = mknod(path, S_IFREG | 0600, 0);
    }
    int problem = errno;
    for (int each = 0; each < number; each++) {
        snprintf(path, sizeof path, "%s/file%d", words[0], each);
        unlink(path);
    }
    errno = problem;
    must(result);
    succeeded("made %d files", most);
}

/* PLACE: a core there, with all that its memory holds. */
static void dump_core(char **words)
{
    struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
    int status, problem = 0;
    must(chdir(words[0]));
    if (setrlimit(RLIMIT_CORE, &all) < 0)
        problem = errno;
    pid_t child = must(fork());
    if (child == 0) {
        prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
        signal(SIGSEGV, SIG_DFL);
        raise(SIGSEGV);
        _exit(0);
    }
    must(waitpid(child, &status, 0));
    if (WCOREDUMP(status))
        succeeded("left a core");
    errno = problem;
    refused("setrlimit RLIMIT_CORE, and no core");
}

const struct attack resources[] = {
    {"fork-bomb", fork_bomb},
    {"fork-on", fork_on},
    {"hog-memory", hog_memory},
    {"hog-descriptors", hog_descriptors},
    {"hog-locks", hog_locks},
    {"hog-requests", hog_requests},
    {"fill", fill},
    {"fill-with-files", fill_with_files},
    {"dump-core", dump_core},
    {0},
};
