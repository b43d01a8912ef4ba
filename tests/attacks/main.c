/* A program in QEMU's place that attacks, as it is ordered to over its serial line.
 *
 * As an instance (launched through the same path as QEMU) it answers the monitor as far as ready,
 * and loads a filter that allows everything, since a start wants a process under seccomp: whatever
 * is refused is refused by what kvmsec put around it. Asked what it can do (`-qmp stdio`), it lets
 * the real QEMU answer. Called with `--control` it takes the same orders from standard input, and
 * attacks as whoever called it.
 *
 * An order is a line: an attack's name and its words. The answer is a line: the name, `succeeded`
 * or the name of the kernel's error, and what was found, or what was refused. In between some
 * attacks say `ready`, and go on when they are sent another line.
 */
#include "hostile.h"

#include "../kvm/hostile/stand_in.h"

#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/wait.h>

enum { DEADLINE_S = 20, WORDS = 64, ORDER_BYTES = 8192 };

char **given;
static const char *name; /* of the attack that this child is */
static int in, out;      /* where orders come from, and where answers go to */

static void answer(const char *word, const char *format, va_list values)
{
    char found[512], text[640];
    vsnprintf(found, sizeof found, format, values);
    int length = snprintf(text, sizeof text, "%s %s %s\n", name, word, found);
    if (write(out, text, length) != length)
        _exit(1);
}

void succeeded(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    answer("succeeded", format, values);
    _exit(0);
}

void refused(const char *what) { refused_as(strerrorname_np(errno), what); }

static void say_refused(const char *word, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    answer(word, format, values);
    va_end(values);
}

void refused_as(const char *word, const char *what)
{
    say_refused(word, "%s", what);
    _exit(0);
}

long must_be(const char *what, long result)
{
    if (result < 0)
        refused(what);
    return result;
}

static int hear_line(char *line, size_t room)
{
    size_t length = 0;
    while (length < room - 1 && read(in, line + length, 1) == 1 && line[length] != '\n')
        length++;
    line[length] = 0;
    return length > 0;
}

void ready(const char *format, ...)
{
    char word[64];
    va_list values;
    va_start(values, format);
    answer("ready", format, values);
    va_end(values);
    alarm(0); /* From here on it is for the other side to end this. */
    hear_line(word, sizeof word);
}

int next_descriptor(int number)
{
    struct stat status;
    int problem = errno;
    while (++number < 1024)
        if (number != in && number != out && fstat(number, &status) == 0 &&
            !S_ISFIFO(status.st_mode))
            break;
    errno = problem; /* What was tried with the last one is what counts. */
    return number < 1024 ? number : -1;
}

/* What this program becomes, and what it says then ------------------------------------------- */

char **as_reporter(void)
{
    static char line[16];
    static char *words[] = {"hostile", "--report-ids", line, 0, 0};
    snprintf(line, sizeof line, "%d", out);
    words[3] = (char *)name;
    return words;
}

static void report_ids(char **words)
{
    uid_t real, effective, saved;
    out = atoi(words[2]);
    name = words[3];
    getresuid(&real, &effective, &saved);
    if (strcmp(name, "execute-set-uid") == 0 && effective == real)
        refused_as("NOGAIN", "it ran, and changed no uid");
    succeeded("a program of its own, with uids %d %d %d", real, effective, saved);
}

int copy_of_itself(const char *path, int mode)
{
    char block[65536];
    ssize_t count;
    int source = must(open(given[0], O_RDONLY));
    int target = must(open(path, O_WRONLY | O_CREAT | O_TRUNC, 0700));
    while ((count = read(source, block, sizeof block)) > 0)
        must(write(target, block, count));
    must(fchmod(target, mode));
    close(source);
    close(target);
    return 0;
}

/* Orders ------------------------------------------------------------------------------------- */

static const struct attack *find(const char *wanted)
{
    const struct attack *rooms[] = {other_instance, host_files, privileges,
                                    network,        resources,  launcher};
    for (size_t room = 0; room < sizeof rooms / sizeof *rooms; room++)
        for (const struct attack *each = rooms[room]; each->name; each++)
            if (strcmp(each->name, wanted) == 0)
                return each;
    return 0;
}

/* What an attack left running would count against the next one. */
static void end_what_is_left(void)
{
    if (getpid() != 1)
        return; /* A control is not alone in its PID namespace. */
    kill(-1, SIGKILL);
    while (wait(0) > 0)
        ;
}

static void carry_out(char *order)
{
    char *words[WORDS + 1] = {0};
    int count = 0, status;
    for (char *word = strtok(order, " "); word && count < WORDS; word = strtok(0, " "))
        words[count++] = word;
    name = words[0];
    const struct attack *attack = find(name);
    pid_t child = fork();
    if (child == 0) {
        alarm(DEADLINE_S);
        if (!attack)
            refused_as("UNKNOWN", "there is no such attack");
        attack->act(words + 1);
        refused_as("SILENT", "the attack came to no end");
    }
    if (child < 0) {
        say_refused(strerrorname_np(errno), "fork for the attack");
        return;
    }
    /* As an instance it is the one that collects what others leave: else that counts on. */
    while (wait(&status) != child)
        ;
    if (WIFSIGNALED(status)) {
        char word[32];
        snprintf(word, sizeof word, "SIG%s", sigabbrev_np(WTERMSIG(status)));
        say_refused(word, "ended the attack");
    }
    end_what_is_left();
}

static void take_orders(void)
{
    char order[ORDER_BYTES];
    while (hear_line(order, sizeof order))
        carry_out(order);
}

static void serve_monitor(int listener)
{
    char heard[4096];
    int client = accept(listener, 0, 0);
    say(client, GREETING);
    while (hear(client, heard, sizeof heard))
        reply(client, heard, strstr(heard, "query-status") ? "{\"status\": \"running\"}" : "{}");
    close(client);
}

static void be_an_instance(void)
{
    struct pollfd both[] = {{descriptor("socket,id=qmp"), POLLIN, 0},
                            {descriptor("socket,id=serial"), POLLIN, 0}};
    shut_in_by_a_filter();
    for (;;) {
        if (poll(both, 2, -1) < 0)
            continue;
        if (both[0].revents)
            serve_monitor(both[0].fd);
        if (both[1].revents) {
            in = out = accept(both[1].fd, 0, 0);
            take_orders();
            close(in);
        }
    }
}

static void become_qemu(void)
{
    const char *names[] = {"qemu-system-x86_64", "/usr/libexec/qemu-kvm", "qemu-kvm", "kvm"};
    for (size_t each = 0; each < sizeof names / sizeof *names; each++)
        execvp(names[each], given);
    exit(1);
}

int main(int count, char **words)
{
    given = arguments = words;
    signal(SIGPIPE, SIG_IGN);
    if (count == 4 && strcmp(words[1], "--report-ids") == 0)
        report_ids(words);
    for (int each = 1; each < count; each++)
        if (strcmp(words[each], "stdio") == 0)
            become_qemu();
    if (count < 2 || strcmp(words[1], "--control") != 0)
        be_an_instance();
    in = 0, out = 1;
    /* The working directory stays outside: a root that is changed so holds nobody. */
    if (count == 3 && chroot(words[2]) < 0)
        return 1;
    take_orders();
    return 0;
}
