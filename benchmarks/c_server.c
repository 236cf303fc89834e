/*
 * c_server.c -- the ceiling: a plain echo server in C. One epoll, one recv and one send a turn, no framing.
 *
 *     c_server PORT        (0: any free port; the line printed first names the port really bound)
 *
 * What the kernel does not take of a reply is kept, and its connection is not read until that is gone.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BATCH = 256, RECV_SIZE = 256 << 10, BACKLOG = 4096 };

struct conn {
    int fd;
    char *unsent; /* what one send left over, NULL when nothing is */
    size_t from, to;
};

static int epfd;
static char inbox[RECV_SIZE];

static void check(int result, const char *what)
{
    if (result >= 0)
        return;
    perror(what);
    exit(1);
}

static void watch(struct conn *c, int operation, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = c};
    check(epoll_ctl(epfd, operation, c->fd, &e), "epoll_ctl");
}

static struct conn *new_conn(int fd)
{
    struct conn *c = calloc(1, sizeof *c);
    c->fd = fd;
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
    return c;
}

static void lose(struct conn *c)
{
    close(c->fd);
    free(c->unsent);
    free(c);
}

static void accept_one(int listener)
{
    int one = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    new_conn(fd);
}

static void keep(struct conn *c, const char *rest, size_t n)
{
    c->unsent = malloc(n);
    memcpy(c->unsent, rest, n);
    c->from = 0;
    c->to = n;
    watch(c, EPOLL_CTL_MOD, EPOLLOUT);
}

static void echo(struct conn *c)
{
    ssize_t sent, n = recv(c->fd, inbox, RECV_SIZE, 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        lose(c);
        return;
    }
    sent = send(c->fd, inbox, (size_t)n, MSG_NOSIGNAL);
    if (sent < 0 && errno == EAGAIN)
        sent = 0;
    if (sent < 0)
        lose(c);
    else if (sent < n)
        keep(c, inbox + sent, (size_t)(n - sent));
}

static void send_rest(struct conn *c)
{
    ssize_t n = send(c->fd, c->unsent + c->from, c->to - c->from, MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n < 0) {
        lose(c);
        return;
    }
    c->from += (size_t)n;
    if (c->from < c->to)
        return;
    free(c->unsent);
    c->unsent = NULL;
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
}

static int open_listener(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    socklen_t size = sizeof address;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    check(fd, "socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    check(bind(fd, (struct sockaddr *)&address, size), "bind");
    check(listen(fd, BACKLOG), "listen");
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("ready c 127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv)
{
    struct epoll_event events[BATCH];
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    epfd = epoll_create1(EPOLL_CLOEXEC);
    struct conn *listener = new_conn(open_listener(argc > 1 ? atoi(argv[1]) : 0));
    for (;;) {
        int n = epoll_wait(epfd, events, BATCH, -1);
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            if (c == listener)
                accept_one(c->fd);
            else if (c->unsent)
                send_rest(c);
            else
                echo(c);
        }
    }
}
