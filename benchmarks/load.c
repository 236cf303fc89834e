/*
 * load.c -- the load generator of the benchmarks: one thread, one epoll.
 *
 *     load echo      HOST PORT --conns C --window W --size S --warmup SEC --seconds SEC [--messages N]
 *     load idle      HOST PORT --conns C --size S [--touch 1]
 *     load broadcast HOST PORT --conns C --size S --warmup SEC --seconds SEC
 *
 * A frame is a 4-byte big-endian length and S bytes of payload. The payload begins with an 8-byte mark (connection and
 * serial number) where it has room for one, and goes on with a pattern; a reply must be the frame that was sent.
 *
 * It is written in C so that it is not what gets measured. What keeps it cheap:
 *  - `stock` holds a run of ready frames. To send k of them their marks are patched and they leave in ONE send; nothing
 *    is copied, and the replies to one recv are refilled by one send.
 *  - Of every reply the length and the mark are compared, of every piece of payload in hand its first PEEK bytes.
 *  - Times go into a histogram of logarithmic buckets; the clock is read once per recv.
 *
 * Prints one line of JSON. Exit status: 0 measured (look at "errors"), 1 could not measure (the reason is on stderr).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    HEADER = 4,             /* bytes of the length */
    MARK = 8,               /* bytes of the mark at the start of a payload */
    PEEK = 64,              /* payload bytes compared in each piece received */
    BATCH = 256,            /* events taken from one epoll_wait */
    RECV_SIZE = 256 << 10,  /* one recv takes at most this */
    STOCK_SIZE = 256 << 10, /* frames joined in one send, unless a single frame is larger */
    PACE = 256,             /* connections opened between two short sleeps, so that no backlog overflows */
    SUB_BITS = 6,           /* 64 buckets per power of two: a percentile is right within 1.6 % */
    BUCKETS = 64 << SUB_BITS
};

static const uint64_t SECOND = 1000000000;     /* in nanoseconds, the unit of every time here */
static const uint64_t GRACE = 5000000000;      /* replies under way at the end must come within this */
static const uint64_t PATIENCE = 30000000000u; /* a connection that is silent this long while a reply is due is lost */

struct conn {
    int fd;
    int writing;       /* EPOLLOUT is asked for */
    uint32_t index;    /* goes into the marks */
    uint32_t queued;   /* frames handed to this connection so far */
    uint32_t sent;     /* of these, wholly with the kernel */
    size_t sent_part;  /* bytes of the next one with the kernel */
    uint32_t received; /* whole replies */
    size_t got;        /* bytes of the next reply */
    uint64_t *since;   /* since[serial % window]: when that frame was queued */
};

static struct {
    const char *mode, *host;
    int port, conns, window, touch;
    size_t size;
    double warmup, seconds;
    uint64_t messages;
} opt;

static int epfd;
static struct conn *conns;
static int alive;
static size_t frame_size;
static char *stock;       /* stock_frames ready frames, one after another */
static size_t stock_frames;
static char *inbox;       /* what one recv brought */

static struct {
    uint64_t messages, errors, begun, ended, max, count;
    uint64_t bucket[BUCKETS];
} result;

static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

/* ---- times -------------------------------------------------------------------------------------------------- */

static int bucket_of(uint64_t ns)
{
    if (ns < (1 << SUB_BITS))
        return (int)ns;
    int shift = 63 - __builtin_clzll(ns) - SUB_BITS;
    return ((shift + 1) << SUB_BITS) + (int)((ns >> shift) & ((1 << SUB_BITS) - 1));
}

static uint64_t bucket_value(int bucket)
{
    int shift = (bucket >> SUB_BITS) - 1;
    if (shift < 0)
        return (uint64_t)bucket;
    return ((uint64_t)((1 << SUB_BITS) + (bucket & ((1 << SUB_BITS) - 1))) << shift) + ((uint64_t)1 << shift) / 2;
}

static void record(uint64_t ns)
{
    result.bucket[bucket_of(ns)]++;
    result.count++;
    if (ns > result.max)
        result.max = ns;
}

static double percentile_us(double part)
{
    uint64_t wanted = (uint64_t)(part * (double)result.count), seen = 0;
    for (int i = 0; i < BUCKETS; i++) {
        seen += result.bucket[i];
        if (seen > wanted)
            return (double)bucket_value(i) / 1e3;
    }
    return (double)result.max / 1e3;
}

static void start_measuring(void)
{
    memset(&result.bucket, 0, sizeof result.bucket);
    result.messages = result.max = result.count = 0;
    result.begun = result.ended = now();
}

static void report(const char *more, ...)
{
    double seconds = (double)(result.ended - result.begun) / 1e9;
    va_list args;
    printf("{\"mode\": \"%s\", \"connections\": %d, \"messages\": %llu, \"seconds\": %.6f, \"msgs_per_s\": %.1f, "
           "\"bytes\": %llu, \"errors\": %llu, \"p50_us\": %.1f, \"p90_us\": %.1f, \"p99_us\": %.1f, "
           "\"p999_us\": %.1f, \"max_us\": %.1f",
           opt.mode, opt.conns, (unsigned long long)result.messages, seconds,
           seconds > 0 ? (double)result.messages / seconds : 0, (unsigned long long)(result.messages * frame_size),
           (unsigned long long)result.errors, percentile_us(.5), percentile_us(.9), percentile_us(.99),
           percentile_us(.999), (double)result.max / 1e3);
    va_start(args, more);
    vprintf(more, args);
    va_end(args);
    puts("}");
    fflush(stdout);
}

/* ---- frames ------------------------------------------------------------------------------------------------- */

static uint64_t mark_of(const struct conn *c, uint32_t serial)
{
    return (uint64_t)c->index << 32 | serial;
}

static void make_stock(size_t most)
{
    frame_size = HEADER + opt.size;
    stock_frames = STOCK_SIZE / frame_size;
    if (stock_frames > most)
        stock_frames = most;
    if (stock_frames < 1)
        stock_frames = 1;
    stock = malloc(stock_frames * frame_size);
    inbox = malloc(RECV_SIZE);
    if (!stock || !inbox)
        die("out of memory");
    uint32_t length = htobe32((uint32_t)opt.size);
    for (size_t i = 0; i < stock_frames; i++) {
        char *frame = stock + i * frame_size;
        memcpy(frame, &length, HEADER);
        for (size_t j = 0; j < opt.size; j++)
            frame[HEADER + j] = (char)(j * 131 + (j >> 8) * 7 + 1);
    }
}

static void put_mark(char *frame, const struct conn *c, uint32_t serial)
{
    uint64_t mark = mark_of(c, serial);
    if (opt.size >= MARK)
        memcpy(frame + HEADER, &mark, MARK);
}

/* Is this piece, which begins at `offset` of a reply, what was sent there? The head is compared whole, of the payload
 * the first PEEK bytes. The first frame of the stock, with the mark due, is what is expected. */
static int piece_is_right(const struct conn *c, size_t offset, const char *piece, size_t n)
{
    size_t head = opt.size >= MARK ? HEADER + MARK : HEADER;
    size_t most = offset < head ? head - offset + PEEK : PEEK;
    if (offset < head)
        put_mark(stock, c, c->received);
    return memcmp(stock + offset, piece, n < most ? n : most) == 0;
}

/* ---- connections -------------------------------------------------------------------------------------------- */

static void allow_files(int wanted)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_max < (rlim_t)wanted)
        limit.rlim_max = (rlim_t)wanted; /* only root may */
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) == 0)
        return;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_max < (rlim_t)wanted)
        die("%d open files are needed, %llu allowed", wanted, (unsigned long long)limit.rlim_max);
}

static int open_socket(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)opt.port)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("socket: %s", strerror(errno));
    if (inet_pton(AF_INET, opt.host, &address.sin_addr) != 1)
        die("%s is not an IPv4 address", opt.host);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        die("connect to %s:%d: %s", opt.host, opt.port, strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static void watch(struct conn *c, int operation, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = c};
    if (epoll_ctl(epfd, operation, c->fd, &e) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

static void open_connections(void)
{
    allow_files(opt.conns + 32);
    epfd = epoll_create1(EPOLL_CLOEXEC);
    conns = calloc((size_t)opt.conns, sizeof *conns);
    for (int i = 0; i < opt.conns; i++) {
        struct conn *c = &conns[i];
        c->fd = open_socket();
        c->index = (uint32_t)i;
        c->since = calloc((size_t)opt.window, sizeof *c->since);
        watch(c, EPOLL_CTL_ADD, EPOLLIN);
        alive++;
        if (i % PACE == PACE - 1)
            usleep(10000);
    }
}

static void lose(struct conn *c, const char *why)
{
    if (result.errors++ < 3)
        fprintf(stderr, "load: connection %u lost: %s\n", c->index, why);
    close(c->fd);
    c->fd = -1;
    alive--;
}

/* Send what is queued: as many frames as the stock holds by each call, until all is out or the kernel is full. */
static void flush(struct conn *c)
{
    while (c->sent != c->queued) {
        size_t frames = c->queued - c->sent;
        if (frames > stock_frames)
            frames = stock_frames;
        for (size_t i = 0; i < frames; i++)
            put_mark(stock + i * frame_size, c, c->sent + (uint32_t)i);
        ssize_t n = send(c->fd, stock + c->sent_part, frames * frame_size - c->sent_part, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN) {
            lose(c, strerror(errno));
            return;
        }
        if (n < 0)
            break;
        c->sent_part += (size_t)n;
        c->sent += (uint32_t)(c->sent_part / frame_size);
        c->sent_part %= frame_size;
    }
    int unsent = c->sent != c->queued;
    if (unsent != c->writing)
        watch(c, EPOLL_CTL_MOD, unsent ? EPOLLIN | EPOLLOUT : EPOLLIN);
    c->writing = unsent;
}

static void queue_frames(struct conn *c, uint32_t count, uint64_t time)
{
    for (uint32_t i = 0; i < count; i++)
        c->since[c->queued++ % (uint32_t)opt.window] = time;
}

/* Take the replies out of n bytes in the inbox. Returns how many are complete, or -1 for a wrong one. */
static int take_replies(struct conn *c, size_t n, uint64_t time)
{
    const char *p = inbox, *end = inbox + n;
    int complete = 0;
    while (p < end) {
        size_t piece = frame_size - c->got;
        if (piece > (size_t)(end - p))
            piece = (size_t)(end - p);
        if (c->received == c->queued || !piece_is_right(c, c->got, p, piece))
            return -1;
        p += piece;
        c->got += piece;
        if (c->got < frame_size)
            break;
        c->got = 0;
        record(time - c->since[c->received++ % (uint32_t)opt.window]);
        complete++;
    }
    return complete;
}

/* One recv. Returns the replies completed (0 is usual with large ones), or -1 when the connection was lost. */
static int receive(struct conn *c)
{
    ssize_t n = recv(c->fd, inbox, RECV_SIZE, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return 0;
    if (n <= 0) {
        lose(c, n < 0 ? strerror(errno) : "closed by the server");
        return -1;
    }
    int complete = take_replies(c, (size_t)n, now());
    if (complete < 0) {
        lose(c, "a reply is not what was sent");
        return -1;
    }
    result.messages += (uint64_t)complete;
    return complete;
}

/* ---- turns -------------------------------------------------------------------------------------------------- */

static int serve_event(struct conn *c, uint32_t events, int refill)
{
    int complete = 0;
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        complete = receive(c);
    if (complete < 0)
        return 0;
    if (refill && complete > 0)
        queue_frames(c, (uint32_t)complete, now());
    flush(c);
    return complete;
}

/* Serve one batch of events; with `refill`, each reply is followed by a new message. Returns the number of replies. A
 * server that is silent for too long ends the run, for then there is nothing to measure. */
static int turn(int refill)
{
    static uint64_t heard;
    struct epoll_event events[BATCH];
    int complete = 0, n = epoll_wait(epfd, events, BATCH, 100);
    for (int i = 0; i < n; i++)
        complete += serve_event(events[i].data.ptr, events[i].events, refill);
    result.ended = now();
    if (n > 0 || heard == 0)
        heard = result.ended;
    if (result.ended - heard > PATIENCE)
        die("the server is silent for %d seconds", (int)(PATIENCE / SECOND));
    return complete;
}

/* ---- echo --------------------------------------------------------------------------------------------------- */

static void echo_for(double seconds)
{
    uint64_t deadline = now() + (uint64_t)(seconds * 1e9);
    while (alive > 0 && now() < deadline)
        turn(1);
}

/* A few counted messages, each connection keeping its window: for what is too large to be timed otherwise. */
static void echo_count(uint64_t messages)
{
    while (alive > 0 && result.messages < messages)
        turn(1);
}

static int waiting(void)
{
    int count = 0;
    for (int i = 0; i < opt.conns; i++)
        count += conns[i].fd >= 0 && conns[i].received != conns[i].queued;
    return count;
}

/* What is still under way must arrive too, else replies got lost; it is not part of what was measured. */
static void drain(void)
{
    uint64_t deadline = now() + GRACE;
    uint64_t messages = result.messages, ended = result.ended;
    while (waiting() && now() < deadline)
        turn(0);
    result.errors += (uint64_t)waiting();
    if (waiting())
        fprintf(stderr, "load: %d connections have no reply\n", waiting());
    result.messages = messages;
    result.ended = ended;
}

static void run_echo(void)
{
    make_stock((size_t)opt.window);
    open_connections();
    start_measuring();
    for (int i = 0; i < opt.conns; i++) {
        queue_frames(&conns[i], (uint32_t)opt.window, now());
        flush(&conns[i]);
    }
    if (opt.messages) {
        echo_count(opt.messages);
    } else {
        echo_for(opt.warmup);
        start_measuring();
        echo_for(opt.seconds);
    }
    drain();
    report(", \"window\": %d, \"size\": %zu, \"alive\": %d", opt.window, opt.size, alive);
}

/* ---- idle --------------------------------------------------------------------------------------------------- */

static void exchange(struct conn *c)
{
    queue_frames(c, 1, now());
    flush(c);
    while (c->received != c->queued && alive == opt.conns)
        turn(0);
}

/* A backlog is first in, first out: when the last connection has its reply, all before it were accepted too. */
static void run_idle(void)
{
    char c;
    make_stock(1);
    open_connections();
    start_measuring();
    for (int i = opt.touch ? 0 : opt.conns - 1; i < opt.conns; i++)
        exchange(&conns[i]);
    result.ended = now();
    report(", \"opened\": %d", alive);
    while (read(0, &c, 1) > 0)
        ;
}

/* ---- broadcast ---------------------------------------------------------------------------------------------- */

/* The last connection sends one packet; every connection, it included, is due to get it. */
static void broadcast_round(void)
{
    uint64_t begun = now();
    int due = alive;
    struct conn *sender = &conns[opt.conns - 1];
    queue_frames(sender, 1, begun);
    flush(sender);
    for (struct conn *c = conns; c < sender; c++) {
        queue_frames(c, 1, begun);
        c->sent = c->queued;
    }
    while (due > 0 && alive == opt.conns)
        due -= turn(0);
}

static uint64_t broadcast_for(double seconds)
{
    uint64_t rounds = 0, deadline = now() + (uint64_t)(seconds * 1e9);
    while (alive == opt.conns && now() < deadline) {
        broadcast_round();
        rounds++;
    }
    return rounds;
}

static void run_broadcast(void)
{
    opt.conns++; /* the sender */
    make_stock(1);
    open_connections();
    for (int i = 0; i < opt.conns; i++)
        conns[i].index = 0; /* all get the same frame */
    broadcast_round();
    broadcast_for(opt.warmup);
    start_measuring();
    uint64_t rounds = broadcast_for(opt.seconds);
    double seconds = (double)(result.ended - result.begun) / 1e9;
    report(", \"size\": %zu, \"rounds\": %llu, \"rounds_per_s\": %.2f", opt.size, (unsigned long long)rounds,
           (double)rounds / seconds);
}

/* ---- command line ------------------------------------------------------------------------------------------- */

static void read_option(const char *name, const char *value)
{
    if (!strcmp(name, "--conns"))
        opt.conns = atoi(value);
    else if (!strcmp(name, "--window"))
        opt.window = atoi(value);
    else if (!strcmp(name, "--size"))
        opt.size = strtoul(value, NULL, 10);
    else if (!strcmp(name, "--warmup"))
        opt.warmup = atof(value);
    else if (!strcmp(name, "--seconds"))
        opt.seconds = atof(value);
    else if (!strcmp(name, "--messages"))
        opt.messages = strtoull(value, NULL, 10);
    else if (!strcmp(name, "--touch"))
        opt.touch = atoi(value);
    else
        die("unknown option %s", name);
}

static void read_options(int argc, char **argv)
{
    if (argc < 4 || argc % 2)
        die("usage: load echo|idle|broadcast HOST PORT [--conns N] [--window N] [--size BYTES] [--warmup SECONDS] "
            "[--seconds SECONDS] [--messages N] [--touch 0|1]");
    opt.mode = argv[1];
    opt.host = argv[2];
    opt.port = atoi(argv[3]);
    opt.conns = 50;
    opt.window = 1;
    opt.size = 64;
    opt.warmup = 0.3;
    opt.seconds = 1;
    for (int i = 4; i + 1 < argc; i += 2)
        read_option(argv[i], argv[i + 1]);
    if (opt.conns < 1 || opt.window < 1)
        die("at least one connection and one message in flight are needed");
}

int main(int argc, char **argv)
{
    read_options(argc, argv);
    if (!strcmp(opt.mode, "echo"))
        run_echo();
    else if (!strcmp(opt.mode, "idle"))
        run_idle();
    else if (!strcmp(opt.mode, "broadcast"))
        run_broadcast();
    else
        die("unknown mode %s", opt.mode);
    return 0;
}
