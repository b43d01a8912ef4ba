/* A QEMU that its guest took over, once it runs: what the stand-in does not do already.
 *
 * Everything up to the guest's start is the stand-in's; what an instance's name says here happens
 * when somebody calls its monitor for the second time, or at once where that is told.
 */
#define _GNU_SOURCE
#define main stand_in_main
#include "stand_in.c"
#undef main

#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>

static void done(const char *act, int result)
{
    if (result < 0) {
        report(act, result);
        pause();
    }
}

/* A connection whose close() waits for an hour: its peer takes nothing more (socket(7), LINGER). */
static int lingering(void)
{
    struct ifreq loopback = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof to;
    struct linger hour = {1, 3600};
    char block[4096] = "";
    if (unshare(CLONE_NEWUSER | CLONE_NEWNET) < 0)
        return dup(1); /* Kept from a network of its own, it passes what it has. */
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    int dialler = socket(AF_INET, SOCK_STREAM, 0);
    done("loopback up", ioctl(listener, SIOCSIFFLAGS, &loopback));
    done("listen", listen(listener, 1));
    done("its port", getsockname(listener, (void *)&to, &length));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    done("connect", connect(dialler, (void *)&to, sizeof to));
    done("accept", accept(listener, 0, 0));
    while (send(dialler, block, sizeof block, MSG_DONTWAIT) > 0)
        ;
    done("linger", setsockopt(dialler, SOL_SOCKET, SO_LINGER, &hour, sizeof hour));
    return dialler;
}

/* Say something and pass a descriptor along, so that the last hold on it is the hearer's. */
static void pass(int line, const char *text, int passed)
{
    char control[CMSG_SPACE(sizeof passed)] = "";
    struct iovec part = {(void *)text, strlen(text)};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof passed);
    memcpy(CMSG_DATA(header), &passed, sizeof passed);
    int result = sendmsg(line, &message, MSG_NOSIGNAL);
    report("pass", result);
    if (result >= 0)
        close(passed);
}

static void take_over(int line)
{
    char heard[4096];
    if (is("passes")) {
        pass(line, GREETING, lingering());
        pause();
    }
    say(line, GREETING);
    hear(line, heard, sizeof heard);
    reply(line, heard, "{}");
    if (is("mute"))
        pause();
}

static void serve_twice(int listener)
{
    char heard[4096];
    int line = accept(listener, 0, 0);
    say(line, GREETING);
    while (hear(line, heard, sizeof heard))
        reply(line, heard, strstr(heard, "query-status") ? "{\"status\": \"running\"}" : "{}");
    close(line);
    take_over(accept(listener, 0, 0));
    pause();
}

/* Give the tap away: to the named uid, for good, and held by nobody. */
static void give_tap(void)
{
    int tap = descriptor("tap,");
    report("owner", ioctl(tap, TUNSETOWNER, 248900));
    report("persist", ioctl(tap, TUNSETPERSIST, 1));
    close(tap);
}

int main(int count, char **given)
{
    arguments = given;
    for (int each = 1; each < count; each++) {
        if (strcmp(given[each], "stdio") == 0)
            return stand_in_main(count, given);
        sscanf(given[each], "guest=%63s", what);
    }
    shut_in_by_a_filter();
    if (is("parent") && fork() == 0)
        for (;;)
            pause();
    if (is("gives-tap"))
        give_tap();
    serve_twice(descriptor("socket,id=qmp"));
}
