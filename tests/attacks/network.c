/* Attempts to send or to be reached over a network. */
#include "hostile.h"

#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sockios.h>
#include <linux/vm_sockets.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/icmp6.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

/* Everybody is on this machine, and what is waited for was done before the wait. Somebody who is
 * not confined has an answer however long that takes. */
enum { PATIENCE_MS = 150, CONTROLS_PATIENCE_MS = 5000 };

static int patience_ms(void)
{
    return given[1] && strcmp(given[1], "--control") == 0 ? CONTROLS_PATIENCE_MS : PATIENCE_MS;
}

static struct sockaddr_storage address;
static socklen_t address_size;

/* ADDRESS PORT; returns the family. A v4-mapped address (::ffff:1.2.3.4) is of IPv6's. */
static int parse(char **words)
{
    struct sockaddr_in *four = (void *)&address;
    struct sockaddr_in6 *six = (void *)&address;
    int port = words[1] ? atoi(words[1]) : 0;
    if (inet_pton(AF_INET, words[0], &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons(port);
        address_size = sizeof *four;
    } else {
        inet_pton(AF_INET6, words[0], &six->sin6_addr);
        six->sin6_family = AF_INET6;
        six->sin6_port = htons(port);
        address_size = sizeof *six;
    }
    return address.ss_family;
}

static int dial(char **words)
{
    int error = 0;
    socklen_t size = sizeof error;
    int dialler = must(socket(parse(words), SOCK_STREAM | SOCK_NONBLOCK, 0));
    struct pollfd end = {dialler, POLLOUT, 0};
    if (connect(dialler, (void *)&address, address_size) < 0 && errno != EINPROGRESS)
        refused("connect");
    if (poll(&end, 1, patience_ms()) == 0)
        refused_as("ETIMEDOUT", "no answer to a SYN");
    getsockopt(dialler, SOL_SOCKET, SO_ERROR, &error, &size);
    if ((errno = error))
        refused("connect");
    return dialler;
}

static void connect_tcp(char **words)
{
    dial(words);
    succeeded("connected to %s", words[0]);
}

static void send_udp(char **words)
{
    int sender = must(socket(parse(words), SOCK_DGRAM, 0));
    must(sendto(sender, "x", 1, 0, (void *)&address, address_size));
    succeeded("sent to %s", words[0]);
}

/* A ping socket, which takes no capability where net.ipv4.ping_group_range lets the group. */
static void send_ping(char **words)
{
    struct icmphdr four = {.type = ICMP_ECHO};
    struct icmp6_hdr six = {.icmp6_type = ICMP6_ECHO_REQUEST};
    int is_four = parse(words) == AF_INET;
    int protocol = is_four ? IPPROTO_ICMP : IPPROTO_ICMPV6;
    int sender = must(socket(address.ss_family, SOCK_DGRAM, protocol));
    must(sendto(sender, is_four ? (void *)&four : (void *)&six, 8, 0, (void *)&address,
                address_size));
    /* Over IPv6 the kernel tells nobody of a drop (net/ipv6/ping.c): the reply is what tells. */
    struct pollfd reply = {sender, POLLIN, 0};
    if (poll(&reply, 1, patience_ms()) == 0)
        refused_as("ETIMEDOUT", "no reply to an echo request");
    succeeded("had an echo reply from %s", words[0]);
}

/* ADDRESS ADDRESS COUNT: datagrams that a packet rule drops, which tells the sender so. */
static void flood_log(char **words)
{
    char *to[] = {0, "5000"};
    int senders[2], most = atoi(words[2]);
    for (int each = 0; each < 2; each++) {
        to[0] = words[each];
        senders[each] = must(socket(parse(to), SOCK_DGRAM, 0));
        must(connect(senders[each], (void *)&address, address_size));
    }
    ready("has sockets");
    for (int count = 0; count < most; count++)
        if (send(senders[count % 2], "x", 1, 0) == 1)
            refused_as("SENT", "no rule drops what it sends");
        else if (errno != EPERM)
            refused("send");
    succeeded("was refused %d times", most);
}

static void send_raw(char **words)
{
    int sender = must(socket(parse(words), SOCK_RAW, 253)); /* RFC 3692: for experiments */
    must(sendto(sender, "x", 1, 0, (void *)&address, address_size));
    succeeded("sent a packet of its own making to %s", words[0]);
}

/* INTERFACE */
static void send_frame(char **words)
{
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons(0x88b5), .sll_halen = 6};
    char frame[60] = "";
    int sender = must(socket(AF_PACKET, SOCK_DGRAM, htons(0x88b5)));
    to.sll_ifindex = if_nametoindex(words[0]);
    must(sendto(sender, frame, sizeof frame, 0, (void *)&to, sizeof to));
    succeeded("sent a frame over %s", words[0]);
}

static void ask_by_netlink(char **words)
{
    struct {
        struct nlmsghdr header;
        struct rtgenmsg body;
    } question = {{sizeof question, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 1, 0}, {AF_UNSPEC}};
    char answer[8192];
    (void)words;
    int asker = must(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));
    must(send(asker, &question, sizeof question, 0));
    succeeded("heard %zd bytes of the interfaces", must(recv(asker, answer, sizeof answer, 0)));
}

/* The host has no address there that a test could dial: that there is a socket is enough. */
static void open_vsock(char **words)
{
    struct sockaddr_vm any = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY};
    (void)words;
    any.svm_port = VMADDR_PORT_ANY;
    int listener = must(socket(AF_VSOCK, SOCK_STREAM, 0));
    must(bind(listener, (void *)&any, sizeof any));
    succeeded("has an address on the host's vsock");
}

/* Being reached: ADDRESS PORT -------------------------------------------------------------------- */

static int listen_there(char **words, int backlog)
{
    int yes = 1;
    int listener = must(socket(parse(words), SOCK_STREAM, 0));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    must(bind(listener, (void *)&address, address_size));
    must(listen(listener, backlog));
    return listener;
}

static int take_call(int listener, int wait_ms)
{
    struct pollfd end = {listener, POLLIN, 0};
    return poll(&end, 1, wait_ms) == 1 ? accept(listener, 0, 0) : -1;
}

static void be_called(char **words)
{
    int listener = listen_there(words, 4);
    ready("listens");
    if (take_call(listener, patience_ms()) < 0)
        refused_as("ETIMEDOUT", "nobody got through");
    succeeded("took a call");
}

static void be_told(char **words)
{
    char heard;
    int listener = must(socket(parse(words), SOCK_DGRAM, 0));
    struct pollfd end = {listener, POLLIN, 0};
    must(bind(listener, (void *)&address, address_size));
    ready("listens");
    if (poll(&end, 1, patience_ms()) == 0)
        refused_as("ETIMEDOUT", "nobody got through");
    must(recv(listener, &heard, 1, 0));
    succeeded("was told something");
}

/* A backlog of none makes the kernel answer with cookies once two have called (tcp(7)). */
static void answer_by_cookie(char **words)
{
    static char much[30000];
    int listener = listen_there(words, 0), calls = 0, wait_ms = patience_ms();
    ready("listens");
    for (int call; calls < 12 && (call = take_call(listener, wait_ms)) >= 0; calls++) {
        send(call, much, sizeof much, MSG_DONTWAIT);
        close(call);
        wait_ms = PATIENCE_MS; /* Some of the others never come. */
    }
    succeeded("took %d calls", calls);
}

/* What close(2) leaves queued has no owner any more, so that no rule by uid matches it. */
static void leave_orphan(char **words)
{
    static char much[60000];
    int dialler = dial(words);
    ready("connected");
    long sent = must(send(dialler, much, sizeof much, MSG_DONTWAIT));
    close(dialler);
    succeeded("left %ld bytes to be sent", sent);
}

/* What it was given ------------------------------------------------------------------------------ */

/* Any INET socket that was left open for it. */
static void use_inherited(char **words)
{
    (void)words;
    for (int each = next_descriptor(2); each >= 0; each = next_descriptor(each)) {
        int domain = 0;
        socklen_t size = sizeof domain;
        getsockopt(each, SOL_SOCKET, SO_DOMAIN, &domain, &size);
        if ((domain == AF_INET || domain == AF_INET6) && send(each, "x", 1, MSG_NOSIGNAL) == 1)
            succeeded("sent over descriptor %d", each);
    }
    refused_as("NONE", "no socket of an IP family");
}

/* Its own tap, in a definition's first NIC; whoever has none opens the device. */
static int tap(void)
{
    for (char **each = given; *each; each++)
        if (strncmp(*each, "tap,", 4) == 0 && strstr(*each, "fd="))
            return atoi(strstr(*each, "fd=") + 3);
    return must(open("/dev/net/tun", O_RDWR));
}

static void make_tap(int descriptor)
{
    struct ifreq asked = {.ifr_name = "hostile0", .ifr_flags = IFF_TAP | IFF_NO_PI};
    must(ioctl(descriptor, TUNSETIFF, &asked));
}

static void second_tap(char **words)
{
    (void)words;
    make_tap(tap());
    succeeded("has another tap");
}

/* Its own, or one that a control has just made. */
static int tap_in_use(void)
{
    int held = tap();
    if (getuid() == 0 && ioctl(held, TUNGETIFF, &(struct ifreq){0}) < 0)
        make_tap(held);
    return held;
}

/* Have the kernel log whatever is done with its tap, and that for ever again. */
static void log_by_tap(char **words)
{
    int size, held = tap_in_use();
    (void)words;
    must(ioctl(held, TUNSETDEBUG, 0xffff));
    must(ioctl(held, TUNGETSNDBUF, &size));
    ioctl(held, TUNSETDEBUG, 0);
    succeeded("the kernel's log has a line for it");
}

/* Let its tap outlast it. */
static void persist_tap(char **words)
{
    int held = tap_in_use();
    (void)words;
    must(ioctl(held, TUNSETPERSIST, 1));
    must(ioctl(held, TUNSETPERSIST, 0));
    succeeded("could have left its tap behind");
}

/* Let a uid open its tap, and only that one. */
static void give_tap(char **words)
{
    (void)words;
    must(ioctl(tap_in_use(), TUNSETOWNER, getuid()));
    succeeded("its tap has an owner");
}

static void group_of_tap(char **words)
{
    (void)words;
    must(ioctl(tap_in_use(), TUNSETGROUP, getgid()));
    succeeded("its tap has a group");
}

/* The address of the node's end: a bridge takes the lowest of its ports', and all frames for any. */
static void address_of_tap(char **words)
{
    struct ifreq asked = {.ifr_hwaddr = {ARPHRD_ETHER, {2, 0, 0, 0, 0, 1}}};
    (void)words;
    must(ioctl(tap_in_use(), SIOCSIFHWADDR, &asked));
    succeeded("the node's end has another address");
}

/* Its link to the bridge, which says so each time. */
static void carrier_of_tap(char **words)
{
    int off = 0, on = 1, held = tap_in_use();
    (void)words;
    must(ioctl(held, TUNSETCARRIER, &off));
    must(ioctl(held, TUNSETCARRIER, &on));
    succeeded("has the node's end go down and up");
}

/* The namespace of its tap's other end, which is the node's. */
static void namespace_of_tap(char **words)
{
    (void)words;
    must(ioctl(tap_in_use(), TUNGETDEVNETNS, 0));
    succeeded("holds the namespace of its tap");
}

/* The namespace that its monitor's socket was made in, which is the node's. */
static void namespace_of_socket(char **words)
{
    (void)words;
    errno = EBADF;
    for (int each = next_descriptor(-1); each >= 0; each = next_descriptor(each))
        if (ioctl(each, SIOCGSKNS, 0) >= 0)
            succeeded("holds the namespace of descriptor %d", each);
        else if (errno == ENOTTY)
            errno = EBADF;
        else if (errno == EPERM)
            break;
    refused("SIOCGSKNS");
}

/* The node's interfaces, which its monitor's socket knows, made in the node's network. */
static void interfaces_of_node(char **words)
{
    struct ifreq asked = {.ifr_ifindex = 1};
    (void)words;
    errno = EBADF;
    for (int each = next_descriptor(-1); each >= 0; each = next_descriptor(each))
        /* 1 is lo, in each network. */
        for (asked.ifr_ifindex = 2; asked.ifr_ifindex < 4096; asked.ifr_ifindex++) {
            if (ioctl(each, SIOCGIFNAME, &asked) >= 0)
                succeeded("descriptor %d knows of %s", each, asked.ifr_name);
            if (errno == EPERM)
                refused("SIOCGIFNAME");
            if (errno != ENODEV)
                break; /* No socket. */
        }
    refused("SIOCGIFNAME");
}

/* NUMBER: the same without an ioctl. A socket is bound once, and tells that interface's name. */
static void interfaces_by_binding(char **words)
{
    char name[IFNAMSIZ];
    socklen_t size = sizeof name;
    int number = atoi(words[0]);
    errno = EBADF;
    for (int each = next_descriptor(-1); each >= 0; each = next_descriptor(each)) {
        if (setsockopt(each, SOL_SOCKET, SO_BINDTOIFINDEX, &number, sizeof number) == 0) {
            must(getsockopt(each, SOL_SOCKET, SO_BINDTODEVICE, name, &size));
            succeeded("descriptor %d is bound to %s", each, name);
        }
        if (errno == EPERM)
            break;
    }
    refused("SO_BINDTOIFINDEX");
}

const struct attack network[] = {
    {"tcp", connect_tcp},
    {"udp", send_udp},
    {"ping", send_ping},
    {"flood-log", flood_log},
    {"raw", send_raw},
    {"frame", send_frame},
    {"netlink", ask_by_netlink},
    {"vsock", open_vsock},
    {"be-called", be_called},
    {"be-called-by-node", be_called},
    {"be-told", be_told},
    {"be-told-by-node", be_told},
    {"answer-by-cookie", answer_by_cookie},
    {"leave-orphan", leave_orphan},
    {"use-inherited", use_inherited},
    {"second-tap", second_tap},
    {"log-by-tap", log_by_tap},
    {"persist-tap", persist_tap},
    {"give-tap", give_tap},
    {"group-of-tap", group_of_tap},
    {"address-of-tap", address_of_tap},
    {"namespace-of-tap", namespace_of_tap},
    {"namespace-of-socket", namespace_of_socket},
    {"interfaces-of-node", interfaces_of_node},
    {"interfaces-by-binding", interfaces_by_binding},
    {"carrier-of-tap", carrier_of_tap},
    {0},
};
