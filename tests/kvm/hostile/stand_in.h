/* What every program in QEMU's place has: its command line, a monitor's words, a filter.
 *
 * A start wants a process under seccomp; which calls the filter lets through is the program's affair.
 */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define GREETING \
    "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0, \"minor\": 2, \"major\": 7}, " \
    "\"package\": \"\"}, \"capabilities\": []}}\r\n"

static char **arguments;

/* The number behind `fd=` in the argument that begins with `start`; -1 without one. */
static int descriptor(const char *start)
{
    for (char **each = arguments; *each; each++)
        if (strncmp(*each, start, strlen(start)) == 0 && strstr(*each, "fd="))
            return atoi(strstr(*each, "fd=") + 3);
    return -1;
}

static void say(int line, const char *text)
{
    while (*text) {
        ssize_t sent = send(line, text, strlen(text), MSG_NOSIGNAL);
        if (sent < 0)
            return;
        text += sent;
    }
}

/* One object from the monitor's client, which ends none with a newline; 0 at its end. */
static int hear(int line, char *heard, size_t room)
{
    size_t length = 0;
    int depth = 0;
    while (length < room - 1 && read(line, heard + length, 1) == 1) {
        depth += (heard[length] == '{') - (heard[length] == '}');
        if (heard[length++] == '}' && depth == 0)
            break;
    }
    heard[length] = 0;
    return length > 0;
}

static void reply(int line, const char *heard, const char *returned)
{
    char id[64] = "", answer[256];
    const char *found = strstr(heard, "\"id\"");
    if (found)
        sscanf(found, "\"id\" : \"%60[^\"]", id);
    snprintf(answer, sizeof answer, "{\"return\": %s, \"id\": \"%s\"}\r\n", returned, id);
    say(line, answer);
}

static void shut_in_by_a_filter(void)
{
    struct sock_filter all = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog filter = {1, &all};
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter);
}
