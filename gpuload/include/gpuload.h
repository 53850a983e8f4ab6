/* gpuload.h: weights that a gpuload server holds, in a C or C++ program, without a copy. C11, C++17; Linux; one file.
 *
 *     gpuload_model model;
 *     char error[GPULOAD_ERROR_BYTES];
 *     if (gpuload_attach(&model, NULL, "llama", NULL, NULL, 60.0, error)) { fprintf(stderr, "%s\n", error); return 1; }
 *     const gpuload_tensor *t = gpuload_find(&model, "model.norm.weight");
 *     ...                                     t->data, t->nbytes, t->dtype, t->shape[0 .. t->rank)
 *     gpuload_release(&model);
 *
 * The memory is read-only, and stays what it is until gpuload_release, whatever the server swaps or whoever dies. A model
 * is one lease: it is released as a whole. Nothing here is shared between calls: each model belongs to whoever uses it,
 * from any thread, one at a time. A forked child shares mappings and lease; only the last to release ends it.
 *
 * Functions return 0, or a gpuload_status with one line in `error`; nothing is held then. Every wait has a deadline, and
 * nothing that a server says is believed before it was checked. Include it first, or define _GNU_SOURCE yourself. With
 * GPULOAD_WITH_CUDA defined before, models on GPUs too: t->data is a device address then (link with -ldl where
 * dlopen is not in the C library). The protocol: PROTOCOL.md beside this folder.
 */
#ifndef GPULOAD_H
#define GPULOAD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#ifdef GPULOAD_WITH_CUDA
#include <dlfcn.h>
#endif

#define GPULOAD_PROTOCOL 4
#define GPULOAD_ERROR_BYTES 600
#define GPULOAD_REPLY_BYTES_MAX (128u << 20)
#define GPULOAD_FDS_MAX 65536
#define GPULOAD_FDS_PER_MESSAGE 200
#define GPULOAD_DEPTH_MAX 32
#define GPULOAD_RANK_MAX 64
#define GPULOAD_NAME_BYTES_MAX 800
#define GPULOAD_GRANULE_BYTES_MAX ((uint64_t)1 << 40)

typedef enum {
    GPULOAD_OK = 0,
    GPULOAD_REFUSED,  /* the server said no, and why */
    GPULOAD_AWAY,     /* nobody answers there, or not in time */
    GPULOAD_PROTOCOL_ERROR, /* it said what the protocol does not know */
    GPULOAD_SYSTEM,   /* the kernel, or a driver, refused */
    GPULOAD_USAGE     /* the arguments mean nothing */
} gpuload_status;

typedef struct {
    const char *name;     /* UTF-8, of the file */
    const char *dtype;    /* as safetensors writes it: "BF16" */
    const uint64_t *shape;
    uint32_t rank;        /* how many of these */
    uint32_t part;        /* of the model, below parts_count */
    uint64_t nbytes;
    const void *data;     /* on a GPU: its address there. NULL if it has no bytes */
} gpuload_tensor;

typedef struct {
    const char *device;   /* "cpu", "cpu:1", or a card's "GPU-..." */
    void *address;        /* of all of it here; a device address on a GPU */
    uint64_t nbytes;
    int cuda_ordinal;     /* -1 on the CPU */
    pid_t pid_;           /* who mapped it: no forked child may call a driver */
    uint64_t unit_;       /* bytes of a granule */
    uint64_t *runs_;      /* pairs: the first granule and how many, side by side here in this order */
    size_t runs_count_;
} gpuload_part;

typedef struct {
    gpuload_tensor *tensors; /* in the order of the files */
    uint64_t tensors_count;
    gpuload_part *parts;
    uint32_t parts_count;
    const char *digest;      /* of all content: equal digests, equal models */
    uint64_t generation;     /* rises when the name comes to stand for other content */
    int sock;                /* the lease */
    char *text_;             /* the answer, in which strings stand */
    uint64_t *shapes_;
    gpuload_tensor **by_name_;
} gpuload_model;

typedef struct {
    uint64_t protocol, pid;
    char version[64];
} gpuload_pong;

/* -- errors and time */

static inline int gpuload_fail_(char *error, gpuload_status status, const char *format, ...) {
    va_list arguments;
    char *c;
    if (!error) return (int)status;
    va_start(arguments, format);
    vsnprintf(error, GPULOAD_ERROR_BYTES, format, arguments);
    va_end(arguments);
    for (c = error; *c; c++) /* one line, whoever wrote it */
        if ((unsigned char)*c < 32 || *c == 127) *c = ' ';
    return (int)status;
}

static inline double gpuload_now_(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* -- JSON, strictly as RFC 8259 has it, in bounds; text[length] is 0 */

typedef struct { const char *at, *end; } gpuload_span_;

static inline const char *gpuload_space_(const char *p) {
    while (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r') p++;
    return p;
}

static inline const char *gpuload_digits_(const char *p) {
    const char *first = p;
    while (*p >= '0' && *p <= '9') p++;
    return p == first ? NULL : p;
}

static inline int gpuload_hex_(const char *p, uint32_t *out) {
    int i;
    *out = 0;
    for (i = 0; i < 4; i++) {
        int c = (unsigned char)p[i], low = c | 32;
        if (c >= '0' && c <= '9') *out = *out * 16 + (uint32_t)(c - '0');
        else if (low >= 'a' && low <= 'f') *out = *out * 16 + (uint32_t)(low - 'a' + 10);
        else return 0;
    }
    return 1;
}

/* The character that an escape after '\' stands for; moves *p behind it. 0: none that a C string could hold. */
static inline uint32_t gpuload_escape_(const char **p) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    uint32_t high, low;
    const char *found = **p ? strchr(from, **p) : NULL;
    if (found) { (*p)++; return (uint32_t)(unsigned char)to[found - from]; }
    if (**p != 'u' || !gpuload_hex_(*p + 1, &high)) return 0;
    *p += 5;
    if (high < 0xD800 || high > 0xDFFF) return high;
    if (high > 0xDBFF || (*p)[0] != '\\' || (*p)[1] != 'u' || !gpuload_hex_(*p + 2, &low) || low < 0xDC00 || low > 0xDFFF) return 0;
    *p += 6;
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
}

/* How many bytes the UTF-8 character at p has; 0: it is none. */
static inline int gpuload_utf8_(const unsigned char *p) {
    int n = *p < 0x80 ? 1 : *p < 0xC2 ? 0 : *p < 0xE0 ? 2 : *p < 0xF0 ? 3 : *p < 0xF5 ? 4 : 0, i;
    for (i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if ((*p == 0xE0 && p[1] < 0xA0) || (*p == 0xED && p[1] > 0x9F) || (*p == 0xF0 && p[1] < 0x90) || (*p == 0xF4 && p[1] > 0x8F)) return 0;
    return n;
}

static inline const char *gpuload_skip_string_(const char *p) { /* behind the closing quote, or NULL */
    for (p++; *p != '"';) {
        if (*p == '\\') {
            p++;
            if (!gpuload_escape_(&p)) return NULL;
        } else {
            int n = (unsigned char)*p < 32 ? 0 : gpuload_utf8_((const unsigned char *)p);
            if (!n) return NULL;
            p += n;
        }
    }
    return p + 1;
}

static inline const char *gpuload_skip_(const char *p, int depth) { /* behind one value, or NULL */
    char open = *p;
    if (depth > GPULOAD_DEPTH_MAX) return NULL;
    if (open == '"') return gpuload_skip_string_(p);
    if (open == '{' || open == '[') {
        char close = open == '{' ? '}' : ']';
        p = gpuload_space_(p + 1);
        if (*p == close) return p + 1;
        for (;;) {
            if (open == '{') {
                if (*p != '"' || !(p = gpuload_skip_string_(p))) return NULL;
                p = gpuload_space_(p);
                if (*p++ != ':') return NULL;
                p = gpuload_space_(p);
            }
            if (!(p = gpuload_skip_(p, depth + 1))) return NULL;
            p = gpuload_space_(p);
            if (*p == close) return p + 1;
            if (*p++ != ',') return NULL;
            p = gpuload_space_(p);
        }
    }
    if (!strncmp(p, "true", 4) || !strncmp(p, "null", 4)) return p + 4;
    if (!strncmp(p, "false", 5)) return p + 5;
    if (*p == '-') p++;
    if (*p == '0') p++;
    else if (!(p = gpuload_digits_(p))) return NULL;
    if (*p == '.' && !(p = gpuload_digits_(p + 1))) return NULL;
    if (*p == 'e' || *p == 'E') {
        p++;
        if (*p == '+' || *p == '-') p++;
        p = gpuload_digits_(p);
    }
    return p;
}

/* The value of a key in the object at p, which was skipped once and is right; at: NULL if it has none. Twice: the last. */
static inline gpuload_span_ gpuload_get_(const char *p, const char *key) {
    gpuload_span_ found = {NULL, NULL};
    size_t length = strlen(key);
    if (*p != '{') return found;
    for (p = gpuload_space_(p + 1); *p == '"';) {
        const char *name = p + 1, *value;
        p = gpuload_skip_string_(p);
        value = gpuload_space_(gpuload_space_(p) + 1);
        if ((size_t)(p - name) == length + 1 && !memcmp(name, key, length)) found.at = value, found.end = gpuload_skip_(value, 0);
        p = gpuload_space_(gpuload_skip_(value, 0));
        if (*p == ',') p = gpuload_space_(p + 1);
    }
    return found;
}

/* The first value in the array at p, and the next behind one; NULL if there is none. Of what was skipped once. */
static inline const char *gpuload_first_(const char *p) {
    if (!p || *p != '[') return NULL;
    p = gpuload_space_(p + 1);
    return *p == ']' ? NULL : p;
}
static inline const char *gpuload_next_(const char *p) {
    p = gpuload_space_(gpuload_skip_(p, 0));
    return *p == ',' ? gpuload_space_(p + 1) : NULL;
}

static inline int gpuload_number_(const char *p, uint64_t *out) { /* a whole number, from 0, below 2^63 */
    *out = 0;
    if (!p || *p < '0' || *p > '9') return 0;
    for (; *p >= '0' && *p <= '9'; p++) {
        if (*out > ((uint64_t)INT64_MAX - 9) / 10) return 0;
        *out = *out * 10 + (uint64_t)(*p - '0');
    }
    return *p != '.' && *p != 'e' && *p != 'E';
}

/* A string where it stands in the text, decoded and ended in place; its closing quote is lost. NULL if it is none. */
static inline const char *gpuload_string_(char *p) {
    char *out;
    const char *in;
    if (!p || *p != '"') return NULL;
    in = out = p + 1;
    while (*in != '"') {
        uint32_t c;
        if (*in != '\\') { *out++ = *in++; continue; }
        in++;
        c = gpuload_escape_(&in);
        if (c < 0x80) *out++ = (char)c;
        else if (c < 0x800) *out++ = (char)(0xC0 | c >> 6), *out++ = (char)(0x80 | (c & 63));
        else if (c < 0x10000) *out++ = (char)(0xE0 | c >> 12), *out++ = (char)(0x80 | (c >> 6 & 63)), *out++ = (char)(0x80 | (c & 63));
        else *out++ = (char)(0xF0 | c >> 18), *out++ = (char)(0x80 | (c >> 12 & 63)), *out++ = (char)(0x80 | (c >> 6 & 63)), *out++ = (char)(0x80 | (c & 63));
    }
    *out = 0;
    return p + 1;
}

/* -- the wire */

/* Waits until the socket can do `events`, or until `until`. */
static inline int gpuload_wait_(int sock, short events, double until, char *error) {
    for (;;) {
        struct pollfd one = {sock, events, 0};
        double left = until - gpuload_now_();
        int n = poll(&one, 1, !(left > 0) ? 0 : left > 3600 ? 3600000 : (int)(left * 1000) + 1);
        if (n > 0) return 0;
        if (n < 0 && errno != EINTR) return gpuload_fail_(error, GPULOAD_SYSTEM, "poll: %s", strerror(errno));
        if (!(left > 0)) return gpuload_fail_(error, GPULOAD_AWAY, "the gpuload server did not answer in time; try later");
    }
}

static inline int gpuload_send_(int sock, const char *bytes, size_t n, double until, char *error) {
    while (n) {
        ssize_t sent = send(sock, bytes, n, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) { bytes += sent; n -= (size_t)sent; continue; }
        if (errno == EPIPE || errno == ECONNRESET) return 0; /* refused in the middle: the answer says why */
        if (errno != EAGAIN && errno != EINTR) return gpuload_fail_(error, GPULOAD_AWAY, "the gpuload server went away: %s", strerror(errno));
        if (errno == EAGAIN) {
            int failed = gpuload_wait_(sock, POLLOUT, until, error);
            if (failed) return failed;
        }
    }
    return 0;
}

static inline int gpuload_receive_(int sock, char *bytes, size_t n, double until, char *error) {
    while (n) {
        ssize_t got;
        int failed = gpuload_wait_(sock, POLLIN, until, error);
        if (failed) return failed;
        got = recv(sock, bytes, n, MSG_DONTWAIT);
        if (got > 0) { bytes += got; n -= (size_t)got; continue; }
        if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        return gpuload_fail_(error, GPULOAD_AWAY, "the gpuload server closed the connection%s%s", got ? ": " : "", got ? strerror(errno) : "");
    }
    return 0;
}

static inline void gpuload_close_(int *fds, size_t n) {
    while (n) close(fds[--n]);
}

/* All descriptors that were announced, behind bytes 'F'; on failure none is left open. */
static inline int gpuload_receive_fds_(int sock, int *fds, size_t n, double until, char *error) {
    size_t have = 0;
    while (have < n) {
        union { char bytes[CMSG_SPACE(GPULOAD_FDS_PER_MESSAGE * sizeof(int))]; struct cmsghdr align; } control;
        char mark = 0;
        struct iovec part = {&mark, 1};
        struct msghdr message;
        struct cmsghdr *c;
        size_t before = have;
        ssize_t got;
        int failed = gpuload_wait_(sock, POLLIN, until, error), is_wrong = 0;
        if (failed) { gpuload_close_(fds, have); return failed; }
        memset(&message, 0, sizeof message);
        message.msg_iov = &part, message.msg_iovlen = 1;
        message.msg_control = control.bytes, message.msg_controllen = sizeof control.bytes;
        got = recvmsg(sock, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
        if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        for (c = got > 0 ? CMSG_FIRSTHDR(&message) : NULL; c; c = CMSG_NXTHDR(&message, c)) {
            size_t i, count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
            for (i = 0; i < count; i++) {
                int fd;
                memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
                if (have < n) fds[have++] = fd;
                else { close(fd); is_wrong = 1; }
            }
        }
        if (got <= 0 || mark != 'F' || have == before || is_wrong || (message.msg_flags & MSG_CTRUNC)) {
            gpuload_close_(fds, have);
            if (got > 0 && (message.msg_flags & MSG_CTRUNC) && mark == 'F')
                return gpuload_fail_(error, GPULOAD_SYSTEM, "of %zu descriptors only %zu could be opened: raise this process's limit (ulimit -n)", n, have);
            return gpuload_fail_(error, got > 0 ? GPULOAD_PROTOCOL_ERROR : GPULOAD_AWAY, "the gpuload server announced %zu descriptors, other than %zu came", n, have);
        }
    }
    return 0;
}

static inline int gpuload_connect_(const char *path, double until, int *sock, char *error) {
    struct sockaddr_un address;
    struct ucred peer;
    socklen_t size = sizeof peer;
    char standard[sizeof address.sun_path];
    const char *runtime = getenv("XDG_RUNTIME_DIR"), *named = path ? path : getenv("GPULOAD_SOCKET");
    double left = until - gpuload_now_();
    struct timeval wait;
    struct stat found;
    if (!named || !*named) {
        named = NULL;
        if (runtime && *runtime && !stat(runtime, &found) && S_ISDIR(found.st_mode)) snprintf(standard, sizeof standard, "%s/gpuload.sock", runtime);
        else snprintf(standard, sizeof standard, "/tmp/gpuload-%u/gpuload.sock", (unsigned)getuid());
    }
    path = named ? named : standard;
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address.sun_path) return gpuload_fail_(error, GPULOAD_USAGE, "a socket's path has at most %zu bytes: %s", sizeof address.sun_path - 1, path);
    memcpy(address.sun_path, path, strlen(path));
    *sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (*sock < 0) return gpuload_fail_(error, GPULOAD_SYSTEM, "socket: %s", strerror(errno));
    if (!(left >= 0.001)) left = 0.001; /* the kernel's own deadline: a full backlog is waited for, in turn */
    if (left > 1e6) left = 1e6;
    wait.tv_sec = (time_t)left, wait.tv_usec = (suseconds_t)((left - (double)wait.tv_sec) * 1e6);
    setsockopt(*sock, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait);
    while (connect(*sock, (struct sockaddr *)&address, sizeof address)) {
        int why = errno;
        if (why == EINTR && gpuload_now_() < until) continue;
        close(*sock);
        if (why == EACCES) return gpuload_fail_(error, GPULOAD_REFUSED, "the gpuload server's socket %s is not for this user", path);
        if (why == EAGAIN) return gpuload_fail_(error, GPULOAD_AWAY, "the gpuload server at %s is busy: it accepted nobody for %.0f s; try later", path, left);
        return gpuload_fail_(error, GPULOAD_AWAY, "no gpuload server at %s (%s); start one with `gpuload serve`", path, strerror(why));
    }
    if (!named && (getsockopt(*sock, SOL_SOCKET, SO_PEERCRED, &peer, &size) || (peer.uid && peer.uid != geteuid()))) {
        close(*sock); /* nobody named it: whoever was first to make it could hand us any weights */
        return gpuload_fail_(error, GPULOAD_REFUSED, "the server at %s is another user's; if you trust it, name its socket", path);
    }
    return 0;
}

/* One question and its answer. text: the answer's object, ended by 0, to be freed; fds: how many descriptors follow. */
static inline int gpuload_ask_(int sock, const char *json, char **text, uint64_t *fds, double until, char *error) {
    size_t n = strlen(json);
    unsigned char head[4] = {(unsigned char)(n >> 24), (unsigned char)(n >> 16), (unsigned char)(n >> 8), (unsigned char)n};
    gpuload_span_ refused, count;
    const char *end;
    int failed = gpuload_send_(sock, (const char *)head, 4, until, error);
    if (!failed) failed = gpuload_send_(sock, json, n, until, error);
    if (!failed) failed = gpuload_receive_(sock, (char *)head, 4, until, error);
    if (failed) return failed;
    n = (size_t)head[0] << 24 | (size_t)head[1] << 16 | (size_t)head[2] << 8 | head[3];
    if (n < 2 || n > GPULOAD_REPLY_BYTES_MAX) return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "an answer of %zu bytes, expected 2 to %u", n, GPULOAD_REPLY_BYTES_MAX);
    *text = (char *)malloc(n + 1);
    if (!*text) return gpuload_fail_(error, GPULOAD_SYSTEM, "no memory for an answer of %zu bytes", n);
    (*text)[n] = 0;
    failed = gpuload_receive_(sock, *text, n, until, error);
    if (!failed && (**text != '{' || !(end = gpuload_skip_(*text, 0)) || end != *text + n))
        failed = gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "an answer that is not a JSON object, or deeper than %d", GPULOAD_DEPTH_MAX);
    if (!failed) {
        refused = gpuload_get_(*text, "error");
        count = gpuload_get_(*text, "fds");
        *fds = 0;
        if (count.at && (!gpuload_number_(count.at, fds) || *fds > GPULOAD_FDS_MAX))
            failed = gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "an answer with %.*s descriptors, expected 0 to %d", (int)(count.end - count.at > 30 ? 30 : count.end - count.at), count.at, GPULOAD_FDS_MAX);
        else if (refused.at) {
            gpuload_span_ why = gpuload_get_(*text, "message");
            const char *message = gpuload_string_((char *)(uintptr_t)why.at), *kind = gpuload_string_((char *)(uintptr_t)refused.at);
            failed = gpuload_fail_(error, GPULOAD_REFUSED, "%s: %s", kind ? kind : "error", message ? message : "the server gave no reason");
        }
    }
    if (failed) free(*text);
    return failed;
}

/* A JSON text's inside of a C string; 0 if it is not UTF-8, or too long. */
static inline int gpuload_quote_(const char *in, char *out, size_t room) {
    size_t used = 0;
    while (*in) {
        int n = gpuload_utf8_((const unsigned char *)in);
        if (!n || used + 8 > room) return 0;
        if (n == 1 && ((unsigned char)*in < 32 || *in == '"' || *in == '\\')) used += (size_t)snprintf(out + used, room - used, "\\u%04x", (unsigned)(unsigned char)*in);
        else memcpy(out + used, in, (size_t)n), used += (size_t)n;
        in += n;
    }
    out[used] = 0;
    return 1;
}

/* Whether a server answers. socket_path: NULL for the usual one. */
static inline int gpuload_ping(const char *socket_path, double timeout_s, gpuload_pong *out, char *error) {
    double until = gpuload_now_() + timeout_s;
    char *text;
    uint64_t fds;
    gpuload_span_ version;
    const char *said;
    int sock, failed = gpuload_connect_(socket_path, until, &sock, error);
    if (failed) return failed;
    failed = gpuload_ask_(sock, "{\"op\":\"ping\"}", &text, &fds, until, error);
    close(sock);
    if (failed) return failed;
    version = gpuload_get_(text, "version");
    if (!gpuload_number_(gpuload_get_(text, "protocol").at, &out->protocol) || !gpuload_number_(gpuload_get_(text, "pid").at, &out->pid) || !(said = gpuload_string_((char *)(uintptr_t)version.at)))
        failed = gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "a ping was not answered by protocol, version and pid");
    else if (out->protocol != GPULOAD_PROTOCOL)
        failed = gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "the server speaks protocol %llu, this program %d", (unsigned long long)out->protocol, GPULOAD_PROTOCOL);
    else snprintf(out->version, sizeof out->version, "%s", said);
    free(text);
    return failed;
}

/* -- memory */

#ifdef GPULOAD_WITH_CUDA
/* The driver API's calls that mapping takes, from the driver's own library. Source: CUDA Driver API, Virtual Memory
 * Management; the names are what cuda.h maps the plain ones to. NOT YET RUN on a GPU. */
typedef struct {
    void *library;
    int (*init)(unsigned), (*count)(int *), (*get)(int *, int), (*uuid)(unsigned char *, int), (*retain)(void **, int);
    int (*push)(void *), (*pop)(void **), (*synchronize)(void);
    int (*reserve)(unsigned long long *, size_t, size_t, unsigned long long, unsigned long long), (*free)(unsigned long long, size_t);
    int (*import)(unsigned long long *, void *, int), (*release)(unsigned long long);
    int (*map)(unsigned long long, size_t, size_t, unsigned long long, unsigned long long), (*unmap)(unsigned long long, size_t);
    int (*access)(unsigned long long, size_t, const void *, size_t);
} gpuload_cuda_;

static inline gpuload_cuda_ *gpuload_load_cuda_(char *error) { /* once for each file that includes this; for ever */
    static gpuload_cuda_ *ready; /* seen by other threads only when it is whole */
    static const char *const names[] = {"cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetUuid_v2", "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuCtxSynchronize", "cuMemAddressReserve", "cuMemAddressFree",
        "cuMemImportFromShareableHandle", "cuMemRelease", "cuMemMap", "cuMemUnmap", "cuMemSetAccess"};
    gpuload_cuda_ *cuda = __atomic_load_n(&ready, __ATOMIC_ACQUIRE), *first = NULL;
    size_t i;
    int result;
    if (cuda) return cuda;
    cuda = (gpuload_cuda_ *)calloc(1, sizeof *cuda);
    if (!cuda) { gpuload_fail_(error, GPULOAD_SYSTEM, "no memory"); return NULL; }
    cuda->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    {
        void **to[] = {(void **)&cuda->init, (void **)&cuda->count, (void **)&cuda->get, (void **)&cuda->uuid, (void **)&cuda->retain, (void **)&cuda->push,
            (void **)&cuda->pop, (void **)&cuda->synchronize, (void **)&cuda->reserve, (void **)&cuda->free, (void **)&cuda->import, (void **)&cuda->release,
            (void **)&cuda->map, (void **)&cuda->unmap, (void **)&cuda->access};
        for (i = 0; cuda->library && i < sizeof names / sizeof *names; i++) {
            void *found = dlsym(cuda->library, names[i]);
            if (!found) { cuda->library = NULL; break; }
            memcpy(to[i], &found, sizeof found);
        }
    }
    if (!cuda->library) { free(cuda); gpuload_fail_(error, GPULOAD_SYSTEM, "no CUDA driver here that maps memory of others (libcuda.so.1)"); return NULL; }
    if ((result = cuda->init(0))) { free(cuda); gpuload_fail_(error, GPULOAD_SYSTEM, "cuInit failed: %d", result); return NULL; }
    if (__atomic_compare_exchange_n(&ready, &first, cuda, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return cuda;
    free(cuda);
    return first;
}

static inline int gpuload_find_card_(gpuload_cuda_ *cuda, const char *name, int *ordinal, char *error) {
    int i, j, count = 0;
    if (cuda->count(&count)) count = 0;
    for (i = 0; i < count; i++) {
        unsigned char raw[16];
        char text[48];
        int n = snprintf(text, sizeof text, "GPU-"), device;
        if (cuda->get(&device, i) || cuda->uuid(raw, device)) continue;
        for (j = 0; j < 16; j++) n += snprintf(text + n, sizeof text - (size_t)n, j == 4 || j == 6 || j == 8 || j == 10 ? "-%02x" : "%02x", raw[j]);
        if (!strcmp(text, name)) { *ordinal = device; return 0; }
    }
    return gpuload_fail_(error, GPULOAD_SYSTEM, "the model stands on %s, which this process does not see", name);
}

/* The first `mapped` runs, each a mapping of its own. */
static inline void gpuload_unmap_cuda_(gpuload_cuda_ *cuda, const gpuload_part *part, unsigned long long at, size_t mapped) {
    unsigned long long from = at;
    size_t i;
    for (i = 0; i < mapped; from += part->runs_[2 * i + 1] * part->unit_, i++) cuda->unmap(from, (size_t)(part->runs_[2 * i + 1] * part->unit_));
    cuda->free(at, (size_t)part->nbytes);
}

static inline int gpuload_map_cuda_(gpuload_part *part, const int *fds, char *error) {
    struct { int type, id, flags; } access = {1, 0, 1}; /* CUmemAccessDesc: a device, this one, reading */
    gpuload_cuda_ *cuda = gpuload_load_cuda_(error);
    unsigned long long at = 0, to, handle;
    void *context;
    size_t i = 0;
    int result, ordinal = 0;
    const char *call = "cuDevicePrimaryCtxRetain";
    if (!cuda) return GPULOAD_SYSTEM;
    if (gpuload_find_card_(cuda, part->device, &ordinal, error)) return GPULOAD_SYSTEM;
    access.id = ordinal;
    result = cuda->retain(&context, ordinal); /* for good: a primary context is others' too */
    if (!result) call = "cuCtxPushCurrent", result = cuda->push(context);
    if (result) return gpuload_fail_(error, GPULOAD_SYSTEM, "%s failed: %d", call, result);
    call = "cuMemAddressReserve";
    result = cuda->reserve(&at, (size_t)part->nbytes, 0, 0, 0);
    for (to = at; !result && i < part->runs_count_; i++) {
        size_t size = (size_t)(part->runs_[2 * i + 1] * part->unit_);
        call = "cuMemImportFromShareableHandle";
        if ((result = cuda->import(&handle, (void *)(intptr_t)fds[i], 1))) break;
        call = "cuMemMap";
        result = cuda->map(to, size, 0, handle, 0);
        cuda->release(handle); /* the mapping keeps the memory */
        if (result) break;
        to += size;
    }
    if (!result) {
        call = "cuMemSetAccess";
        result = cuda->access(at, (size_t)part->nbytes, &access, 1);
    }
    if (result && at) gpuload_unmap_cuda_(cuda, part, at, i);
    cuda->pop(&context);
    if (result) return gpuload_fail_(error, GPULOAD_SYSTEM, "%s failed: %d", call, result);
    part->address = (void *)(uintptr_t)at, part->cuda_ordinal = ordinal, part->pid_ = getpid();
    return 0;
}

static inline void gpuload_release_cuda_(gpuload_part *part) {
    gpuload_cuda_ *cuda = gpuload_load_cuda_(NULL);
    void *context;
    if (!cuda || cuda->retain(&context, part->cuda_ordinal) || cuda->push(context)) return;
    cuda->synchronize(); /* a kernel that reads these weights may still be queued */
    gpuload_unmap_cuda_(cuda, part, (unsigned long long)(uintptr_t)part->address, part->runs_count_);
    cuda->pop(&context);
}
#endif

static inline int gpuload_map_(gpuload_part *part, const int *fds, size_t n, char *error) {
    const uint64_t *runs = part->runs_, unit = part->unit_;
    const size_t runs_count = part->runs_count_;
    struct stat file;
    char *at;
    size_t i;
    int seals;
    if (strncmp(part->device, "cpu", 3)) {
#ifdef GPULOAD_WITH_CUDA
        if (n != runs_count) return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "%zu descriptors came for %s, expected %zu", n, part->device, runs_count);
        return gpuload_map_cuda_(part, fds, error);
#else
        return gpuload_fail_(error, GPULOAD_USAGE, "the model stands on %s: compile with GPULOAD_WITH_CUDA", part->device);
#endif
    }
    if (n != 1) return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "%zu descriptors came for %s, expected 1", n, part->device);
    seals = fcntl(fds[0], F_GET_SEALS);
    if (fstat(fds[0], &file) || seals < 0 || !(seals & F_SEAL_SHRINK)) return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "the memory of %s is not sealed: it could shrink below us", part->device);
    for (i = 0; i < runs_count; i++)
        if (runs[2 * i] + runs[2 * i + 1] > (uint64_t)file.st_size / unit)
            return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "granules up to %llu of %s, which has %llu", (unsigned long long)(runs[2 * i] + runs[2 * i + 1]), part->device, (unsigned long long)((uint64_t)file.st_size / unit));
    at = (char *)mmap(NULL, (size_t)part->nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return gpuload_fail_(error, GPULOAD_SYSTEM, "no addresses for %llu bytes: %s", (unsigned long long)part->nbytes, strerror(errno));
    part->address = at;
    for (i = 0; i < runs_count; at += runs[2 * i + 1] * unit, i++)
        if (mmap(at, (size_t)(runs[2 * i + 1] * unit), PROT_READ, MAP_SHARED | MAP_FIXED, fds[0], (off_t)(runs[2 * i] * unit)) == MAP_FAILED) {
            int why = errno;
            munmap(part->address, (size_t)part->nbytes);
            part->address = NULL;
            return gpuload_fail_(error, GPULOAD_SYSTEM, "mmap of the server's memory: %s", strerror(why));
        }
    return 0;
}

/* Gives the memory back to the server, when all others who have it (forked children) have done so. Idempotent. On a GPU it
 * waits for kernels that are queued: not while a graph is captured. */
static inline void gpuload_release(gpuload_model *model) {
    uint32_t i;
    for (i = 0; model->parts && i < model->parts_count; i++) {
        gpuload_part *part = &model->parts[i];
        if (!part->address) continue;
#ifdef GPULOAD_WITH_CUDA
        if (part->cuda_ordinal >= 0) {
            if (part->pid_ == getpid()) gpuload_release_cuda_(part);
            continue;
        }
#endif
        munmap(part->address, (size_t)part->nbytes);
    }
    if (model->sock >= 0) close(model->sock); /* unmapped first: from here on the server may write there */
    for (i = 0; model->parts && i < model->parts_count; i++) free(model->parts[i].runs_);
    free(model->tensors);
    free(model->parts);
    free(model->shapes_);
    free(model->by_name_);
    free(model->text_);
    memset(model, 0, sizeof *model);
    model->sock = -1;
}

/* -- the table */

static inline size_t gpuload_count_(const char *array) {
    size_t n = 0;
    const char *p;
    for (p = gpuload_first_(array); p; p = gpuload_next_(p)) n++;
    return n;
}

static inline int gpuload_compare_(const void *left, const void *right) {
    return strcmp((*(gpuload_tensor *const *)left)->name, (*(gpuload_tensor *const *)right)->name);
}

static inline unsigned gpuload_dtype_bits_(const char *dtype) { /* 0: one that is newer than this file */
    static const struct { const char *name; unsigned bits; } known[] = {{"BOOL", 8}, {"U8", 8}, {"I8", 8}, {"U16", 16}, {"I16", 16}, {"F16", 16}, {"BF16", 16},
        {"U32", 32}, {"I32", 32}, {"F32", 32}, {"U64", 64}, {"I64", 64}, {"F64", 64}, {"C64", 64}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8},
        {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6}};
    size_t i;
    for (i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i].name, dtype)) return known[i].bits;
    return 0;
}

/* Maps the parts: {"device", "granule_bytes", "runs": [[first, count], ...], "fds"} each. */
static inline int gpuload_take_parts_(gpuload_model *model, const char *parts, const int *fds, size_t fds_count, char *error) {
    const char *part = gpuload_first_(parts), *run;
    uint32_t i;
    size_t used = 0;
    for (i = 0; part; i++) {
        const char *next = gpuload_next_(part), *runs = gpuload_get_(part, "runs").at;
        const char *device = gpuload_get_(part, "device").at;
        gpuload_part *to = &model->parts[i];
        uint64_t own, unit, granules = 0, *pairs;
        size_t n = 0, count = gpuload_count_(runs);
        int failed = 0;
        if (!runs || *runs != '[' || !gpuload_number_(gpuload_get_(part, "fds").at, &own) || own > fds_count - used || !gpuload_number_(gpuload_get_(part, "granule_bytes").at, &unit) || unit % 4096 || !unit || unit > GPULOAD_GRANULE_BYTES_MAX)
            return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "part %u of the answer is none", i);
        pairs = to->runs_ = (uint64_t *)malloc((2 * count + 1) * sizeof *pairs);
        if (!pairs) return gpuload_fail_(error, GPULOAD_SYSTEM, "no memory for %zu runs", count);
        for (run = gpuload_first_(runs); run && !failed; run = gpuload_next_(run), n++) {
            const char *first = gpuload_first_(run), *many = first ? gpuload_next_(first) : NULL;
            if (!many || gpuload_next_(many) || !gpuload_number_(first, &pairs[2 * n]) || !gpuload_number_(many, &pairs[2 * n + 1]) || !pairs[2 * n + 1]
                || pairs[2 * n] > (uint64_t)INT64_MAX / 2 / unit || pairs[2 * n + 1] > (uint64_t)INT64_MAX / 2 / unit || (granules += pairs[2 * n + 1]) > (uint64_t)INT64_MAX / 2 / unit)
                failed = gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "run %zu of part %u is none", n, i);
        }
        to->device = gpuload_string_((char *)(uintptr_t)device);
        to->nbytes = granules * unit, to->unit_ = unit, to->runs_count_ = n, to->cuda_ordinal = -1;
        if (!failed && !to->device) failed = gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "part %u has no device", i);
        if (!failed && count) failed = gpuload_map_(to, fds + used, (size_t)own, error);
        if (failed) return failed;
        used += (size_t)own;
        part = next;
    }
    return used == fds_count ? 0 : gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "%zu descriptors came, the parts have %zu", fds_count, used);
}

/* Rows: [name, dtype, [shape, ...], part, offset, nbytes] each. */
static inline int gpuload_take_tensors_(gpuload_model *model, const char *rows, char *error) {
    const char *row = gpuload_first_(rows), *dim;
    uint64_t *shape = model->shapes_, i;
    for (i = 0; row; i++) {
        gpuload_tensor *to = &model->tensors[i];
        const char *next = gpuload_next_(row), *field[6];
        uint64_t part, offset, bits = 0;
        size_t n = 0;
        int is_odd = 0;
        for (dim = gpuload_first_(row); dim && n < 6; dim = gpuload_next_(dim)) field[n++] = dim;
        if (n != 6 || dim || *field[2] != '[' || !gpuload_number_(field[3], &part) || !gpuload_number_(field[4], &offset) || !gpuload_number_(field[5], &to->nbytes) || part >= model->parts_count)
            return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "row %llu of the table is none", (unsigned long long)i);
        to->shape = shape, bits = 1;
        for (dim = gpuload_first_(field[2]); dim; dim = gpuload_next_(dim), shape++) {
            if (++to->rank > GPULOAD_RANK_MAX || !gpuload_number_(dim, shape)) is_odd = 1;
            else if (*shape && bits > ((uint64_t)1 << 56) / *shape) is_odd = 1;
            else bits *= *shape;
            if (is_odd) break;
        }
        to->name = gpuload_string_((char *)(uintptr_t)field[0]), to->dtype = gpuload_string_((char *)(uintptr_t)field[1]), to->part = (uint32_t)part;
        if (is_odd || !to->name || !to->dtype) return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "row %llu of the table is none", (unsigned long long)i);
        if (offset > model->parts[part].nbytes || to->nbytes > model->parts[part].nbytes - offset)
            return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "tensor %.200s stands at [%llu, +%llu) of %llu bytes", to->name, (unsigned long long)offset, (unsigned long long)to->nbytes, (unsigned long long)model->parts[part].nbytes);
        if (gpuload_dtype_bits_(to->dtype) && (bits * gpuload_dtype_bits_(to->dtype) + 7) / 8 != to->nbytes)
            return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "tensor %.200s has %llu bytes, which its shape and type have not", to->name, (unsigned long long)to->nbytes);
        if (to->nbytes) to->data = (const char *)model->parts[part].address + offset;
        model->by_name_[i] = to;
        row = next;
    }
    qsort(model->by_name_, (size_t)model->tensors_count, sizeof *model->by_name_, gpuload_compare_);
    for (i = 1; i < model->tensors_count; i++)
        if (!strcmp(model->by_name_[i - 1]->name, model->by_name_[i]->name)) return gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "two tensors are called %.200s", model->by_name_[i]->name);
    return 0;
}

/* The tensors of a resident model.
 *
 * socket_path: NULL: $GPULOAD_SOCKET, or the usual place. device: NULL: all of it, wherever it stands; else only what is on
 * that one ("cpu", a card's "GPU-..."): so a rank is attached. digest: NULL, or refuse other content. Several ranks: the
 * first tells the others its model->digest. timeout_s: for all of it.
 */
static inline int gpuload_attach(gpuload_model *model, const char *socket_path, const char *name, const char *device, const char *digest, double timeout_s, char *error) {
    double until = gpuload_now_() + timeout_s;
    char quoted[3][GPULOAD_NAME_BYTES_MAX + 16], request[4 * GPULOAD_NAME_BYTES_MAX];
    const char *parts, *tensors, *row, *said;
    uint64_t fds_count = 0, shapes = 0;
    int *fds = NULL, failed;
    memset(model, 0, sizeof *model);
    model->sock = -1;
    if (!name || !gpuload_quote_(name, quoted[0], sizeof quoted[0]) || !gpuload_quote_(device ? device : "", quoted[1], sizeof quoted[1]) || !gpuload_quote_(digest ? digest : "", quoted[2], sizeof quoted[2]))
        return gpuload_fail_(error, GPULOAD_USAGE, "model, device and digest are UTF-8 of at most %d bytes", GPULOAD_NAME_BYTES_MAX);
    snprintf(request, sizeof request, "{\"op\":\"attach\",\"model\":\"%s\"%s%s%s%s%s%s}", quoted[0], device ? ",\"device\":\"" : "", quoted[1], device ? "\"" : "", digest ? ",\"digest\":\"" : "", quoted[2], digest ? "\"" : "");
    failed = gpuload_connect_(socket_path, until, &model->sock, error);
    if (failed) { model->sock = -1; return failed; }
    failed = gpuload_ask_(model->sock, request, &model->text_, &fds_count, until, error);
    if (failed) { model->text_ = NULL; gpuload_release(model); return failed; }
    fds = (int *)malloc((size_t)(fds_count + 1) * sizeof *fds);
    if (!fds) failed = gpuload_fail_(error, GPULOAD_SYSTEM, "no memory for %llu descriptors", (unsigned long long)fds_count);
    if (!failed) failed = gpuload_receive_fds_(model->sock, fds, (size_t)fds_count, until, error);
    if (failed) { free(fds); gpuload_release(model); return failed; }
    parts = gpuload_get_(model->text_, "parts").at, tensors = gpuload_get_(model->text_, "tensors").at, said = gpuload_get_(model->text_, "digest").at;
    if (!parts || *parts != '[' || !tensors || *tensors != '[' || !gpuload_number_(gpuload_get_(model->text_, "generation").at, &model->generation))
        failed = gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "an attach that was not answered by parts, tensors and generation");
    if (!failed) {
        for (row = gpuload_first_(tensors); row; row = gpuload_next_(row)) {
            const char *p = gpuload_first_(row);
            if (p && (p = gpuload_next_(p)) && (p = gpuload_next_(p))) shapes += gpuload_count_(p);
            model->tensors_count++;
        }
        model->parts_count = (uint32_t)gpuload_count_(parts);
        model->parts = (gpuload_part *)calloc(model->parts_count + 1u, sizeof *model->parts);
        model->tensors = (gpuload_tensor *)calloc((size_t)model->tensors_count + 1, sizeof *model->tensors);
        model->by_name_ = (gpuload_tensor **)calloc((size_t)model->tensors_count + 1, sizeof *model->by_name_);
        model->shapes_ = (uint64_t *)calloc((size_t)shapes + 1, sizeof *model->shapes_);
        if (!model->parts || !model->tensors || !model->by_name_ || !model->shapes_) failed = gpuload_fail_(error, GPULOAD_SYSTEM, "no memory for a table of %llu tensors", (unsigned long long)model->tensors_count);
    }
    if (!failed) failed = gpuload_take_parts_(model, parts, fds, (size_t)fds_count, error);
    gpuload_close_(fds, (size_t)fds_count); /* mappings do not need them */
    free(fds);
    if (!failed) failed = gpuload_take_tensors_(model, tensors, error);
    if (!failed && !(model->digest = gpuload_string_((char *)(uintptr_t)said))) failed = gpuload_fail_(error, GPULOAD_PROTOCOL_ERROR, "an attach that was answered without a digest");
    if (failed) gpuload_release(model);
    return failed;
}

/* The tensor of that name, or NULL. */
static inline const gpuload_tensor *gpuload_find(const gpuload_model *model, const char *name) {
    gpuload_tensor key, *wanted = &key, **found;
    memset(&key, 0, sizeof key);
    key.name = name;
    if (!model->tensors_count) return NULL;
    found = (gpuload_tensor **)bsearch(&wanted, model->by_name_, (size_t)model->tensors_count, sizeof *model->by_name_, gpuload_compare_);
    return found ? *found : NULL;
}

#endif
