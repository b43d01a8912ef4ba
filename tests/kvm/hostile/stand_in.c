/* A program in QEMU's place that does what it is called for.
 *
 * Asked what it can do (`-qmp stdio`), it lets the real QEMU answer, unless its own name says
 * otherwise: only the look at a program is done where such a name can be seen. Started as an
 * instance it behaves as the instance's name says, so that one program, asked once, serves all
 * tests. It is static: its closure is itself.
 */
#include "stand_in.h"

#include <fcntl.h>
#include <linux/if_tun.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static char what[64]; /* the instance's name */

static int is(const char *word) { return strcmp(what, word) == 0; }

static void crash(void)
{
    /* A first process of a PID namespace is spared signals of its own: this ends in a fault. */
    abort();
}

static void flood(int line, const char *piece)
{
    char many[8192] = "";
    while (strlen(many) + strlen(piece) < sizeof many)
        strcat(many, piece);
    while (send(line, many, strlen(many), MSG_NOSIGNAL) >= 0)
        ;
}

/* What a broken or hostile monitor does once somebody has connected. */
static void misbehave(int line)
{
    char heard[4096];
    if (is("garbage"))
        say(line, "220 mail.example ESMTP\r\n");
    else
        say(line, GREETING);
    if (is("floods") || is("floods-later"))
        flood(line, "{\"event\": \"STOP\", \"data\": {\"n\": \"xxxxxxxxxxxxxxxxxxxxxxxxxxxx\"}, "
                    "\"timestamp\": {\"seconds\": 1, \"microseconds\": 1}}\r\n");
    if (is("one-line"))
        flood(line, "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[");
    hear(line, heard, sizeof heard);
    if (is("dies-midway")) {
        say(line, "{\"retu");
        fputs("stand-in: about to die\n", stderr);
        crash();
    }
    if (is("refuses"))
        say(line, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no \\u001b[31mluck\"}, "
                  "\"id\": \"__qmp#00000\"}\r\n");
    if (is("another-id"))
        say(line, "{\"return\": {}, \"id\": \"__qmp#77777\"}\r\n");
}

static int misbehaves(void)
{
    return is("garbage") || is("floods") || is("one-line") || is("dies-midway") ||
           is("refuses") || is("another-id") || is("greets-only");
}

/* A monitor as it should be, for as long as the instance lives. */
static void serve(int listener)
{
    char heard[4096];
    for (int calls = 1;; calls++) {
        int line = accept(listener, 0, 0);
        if (misbehaves() || (is("floods-later") && calls > 1)) {
            misbehave(line);
            pause();
        }
        say(line, GREETING);
        while (hear(line, heard, sizeof heard)) {
            reply(line, heard, strstr(heard, "query-status") ? "{\"status\": \"running\"}" : "{}");
            if (strstr(heard, "\"cont\"") && is("goes-silent"))
                pause();
            if (strstr(heard, "\"cont\"") && is("crashes")) {
                fputs("stand-in: the guest won\n", stderr);
                crash();
            }
            if (strstr(heard, "\"cont\"") && is("mounts"))
                mount("tmpfs", "/output", "tmpfs", 0, 0);
            if (strstr(heard, "system_powerdown") && !is("deaf"))
                exit(0);
        }
        close(line);
    }
}

/* What a hostile instance does with what it was given ---------------------------------------- */

static void report(const char *act, int result)
{
    printf("%s: %s\n", act, result < 0 ? strerror(errno) : "done");
    fflush(stdout);
}

static void try_open(const char *path, int flags)
{
    char act[256];
    snprintf(act, sizeof act, "%s %s", flags & O_CREAT ? "create" : "open", path);
    int opened = open(path, flags | O_NONBLOCK, 0600);
    report(act, opened);
    close(opened);
}

static int try_mount(void) { return mount("tmpfs", "/output", "tmpfs", 0, 0); }
static int try_chroot(void) { return chroot("/output"); }
static int try_root(void) { return setuid(0); }

/* A second program: what it would be is no matter, for none may be executed. */
static int try_program(void)
{
    char *argv[] = {"made", 0};
    return execv("/output/made", argv);
}

/* What may end its caller, by a child. */
static void try_apart(const char *act, int (*attempt)(void))
{
    int ended;
    pid_t child = fork();
    if (child == 0) {
        report(act, attempt());
        _exit(0);
    }
    waitpid(child, &ended, 0);
    if (WIFSIGNALED(ended)) {
        printf("%s: %s\n", act, strsignal(WTERMSIG(ended)));
        fflush(stdout);
    }
}

static void explore(void)
{
    const char *there[] = {"/etc/passwd", "/etc/shadow", "/proc/self/status", "/proc/1/root",
                           "/sys/kernel", "/run/kvmsec", "/tmp", "/root", "/old", "/dev/net/tun",
                           "/dev/vhost-net", "/dev/mem", "/dev/kvm", "/dev/fuse", "..", 0};
    const char *made[] = {"/made", "/dev/made", "/boot/made", "/tmp/made", "/usr/made",
                          "/output/made", 0};
    for (const char **path = there; *path; path++)
        try_open(*path, O_RDONLY);
    for (const char **path = made; *path; path++)
        try_open(*path, O_CREAT | O_WRONLY);
    report("device /output/mem", mknod("/output/mem", S_IFCHR | 0600, makedev(1, 1)));
    try_apart("mount", try_mount);
    try_apart("chroot", try_chroot);
    try_apart("become root", try_root);
    try_apart("a second program", try_program);
    report("own bytes as a program", chmod("/output/made", 04755));
    report("kill of another", kill(2, 0));
    report("packet socket", socket(AF_PACKET, SOCK_RAW, 0));
    report("vsock socket", socket(AF_VSOCK, SOCK_STREAM, 0));
    int sender = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr to = {AF_INET, {0, 9, 127, 0, 0, 1}};
    report("send to loopback", sendto(sender, "x", 1, 0, &to, sizeof to));
    close(sender); /* a socket that nobody granted would be a finding */
}

static void fill(void)
{
    char name[64], block[4096];
    memset(block, 'x', sizeof block);
    for (int number = 0; number < 64; number++) {
        snprintf(name, sizeof name, "/output/filler%d", number);
        int file = open(name, O_CREAT | O_WRONLY, 0600);
        while (file >= 0 && write(file, block, sizeof block) > 0)
            ;
    }
    while (write(1, block, sizeof block) > 0)
        ;
    report("filling", -1);
}

/* Names that kvmsec will look at as root, made into what root must not follow or open. */
static void swap_names(void)
{
    const char *log = "/output/qemu.log", *serial = "/output/serial.log";
    unlink(log);
    unlink(serial);
    if (is("links")) {
        report("link", symlink("/etc/shadow", log));
        report("link", symlink("/proc/self/mem", serial));
    }
    if (is("fifos")) {
        report("fifo", mkfifo(log, 0666));
        report("fifo", mkfifo(serial, 0666));
    }
    if (is("directories")) {
        report("directory", mkdir(log, 0));
        report("directory", mkdir(serial, 0));
    }
    if (is("sockets")) {
        struct sockaddr_un name = {AF_UNIX, "/output/qemu.log"};
        report("socket", bind(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&name, sizeof name));
    }
    if (is("giant")) {
        int file = open(log, O_CREAT | O_WRONLY, 0600);
        report("giant", ftruncate(file, 1L << 40));
    }
}

/* Children that no parent waits for and that heed no signal; said once all are there. */
static void have_children(void)
{
    int ready[2];
    char word;
    report("pipe", pipe(ready));
    for (int number = 0; number < 20; number++) {
        if (fork() > 0)
            continue;
        setsid();
        for (int each = 1; each < 65; each++)
            signal(each, SIG_IGN);
        if (fork() > 0)
            _exit(0);
        close(ready[1]);
        for (;;)
            pause();
    }
    close(ready[1]); /* The pipe ends once every one of them has closed it, too. */
    while (read(ready[0], &word, 1) > 0)
        ;
    close(ready[0]);
    report("children", 0);
}

/* Take a call on the serial line, and never read a byte of it. */
static void hold_line(void)
{
    if (fork() > 0)
        return;
    report("held", accept(descriptor("socket,id=serial"), 0, 0));
    for (;;)
        pause();
}

/* Undo, through the descriptor, what makes a tap go when its holder does. */
static void keep_tap(void)
{
    int tap = descriptor("tap,");
    report("persist", ioctl(tap, TUNSETPERSIST, 1));
    report("owner", ioctl(tap, TUNSETOWNER, getuid()));
}

/* Asked what it can do ----------------------------------------------------------------------- */

static int ends_with(const char *text, const char *end)
{
    size_t length = strlen(text), wanted = strlen(end);
    return length >= wanted && strcmp(text + length - wanted, end) == 0;
}

static void answer(const char *name)
{
    if (ends_with(name, "/exits")) {
        fputs("stand-in: no \033[31mluck\n", stderr);
        exit(7);
    }
    if (ends_with(name, "/never-answers"))
        pause();
    if (ends_with(name, "/talks"))
        for (;;)
            puts("{\"QMP\": 1}");
    if (ends_with(name, "/greets-only")) {
        fputs(GREETING, stdout);
        exit(0);
    }
    if (ends_with(name, "/too-old")) {
        puts("{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 9, \"minor\": 2, \"major\": 6}, "
             "\"package\": \"\"}, \"capabilities\": []}}");
        exit(0);
    }
    execv(QEMU, arguments);
    exit(1);
}

int main(int count, char **given)
{
    arguments = given;
    for (int each = 1; each < count; each++) {
        if (strcmp(given[each], "stdio") == 0)
            answer(given[0]);
        sscanf(given[each], "guest=%63s", what);
    }
    if (is("forges"))
        fputs("\nkvmsec: all is well\nhint: say yes\n", stderr);
    if (is("exits") || is("forges")) {
        fputs("stand-in: no \033[31mluck\n", stderr);
        return 7;
    }
    if (is("never-answers"))
        for (;;)
            pause();
    if (!is("unfiltered"))
        shut_in_by_a_filter();
    if (is("explores"))
        explore();
    if (is("fills"))
        fill();
    if (is("children"))
        have_children();
    if (is("keeps-tap"))
        keep_tap();
    if (is("never-drains"))
        hold_line();
    if (is("links") || is("fifos") || is("directories") || is("sockets") || is("giant"))
        swap_names();
    serve(descriptor("socket,id=qmp"));
}
