/* A stand-in for libcuda.so.1 on host memory: the calls of gpuload/device/driver.py with the prototypes of cuda.h.
 *
 * It shows that arguments, structs and descriptors cross ctypes as meant, and that granules are mapped, exported and
 * imported in the right order. It shows nothing about a real driver, its speed or its rules beyond those checked here:
 * a context must be current, sizes must be multiples of the granularity, access must be set before use, memory that is
 * mapped read-only must be registered as such, once, a forked child may call nothing. With -DWITH_CUDA_H the prototypes
 * are checked against NVIDIA's own.
 *
 * The environment, read by cuInit, makes it a model (tools/gpu/simulate says how to use it):
 *   STANDIN_PRICES=1            calls and copies take what prices.h says. One engine per card and direction copies in the
 *                               order of queueing; bytes are read when their copy ends, so a source that is used again too early
 *                               arrives wrong. STANDIN_<PRICE>=x replaces one price.
 *   STANDIN_MOVES_NOTHING=1     copies take their time and move no byte, as a card's engine takes no CPU; no memory either
 *   STANDIN_DEVICES=n           cards, each with a UUID of its own; CUDA_VISIBLE_DEVICES narrows and permutes them
 *   STANDIN_NODES=0,1,..        the NUMA node of each card
 *   STANDIN_MEMORY=bytes        of each card; half of it is others'
 *   STANDIN_GRANULARITY=bytes   2097152 on real cards
 *   STANDIN_COMPUTE_MODE=3      exclusive to one process, as attribute 20 says it; nobody is refused
 *   STANDIN_CUDA, STANDIN_CAPABILITY  what driver and card say of themselves: 12040, 80
 *   STANDIN_STICKY=code@n       the n-th copy from now fails, and every later call with it
 *   STANDIN_CENSUS=name         memory in use is that of all processes with this name: a granule is, as long as one has a
 *                               descriptor or a mapping of it (read by each call)
 *   STANDIN_NO_READ_ONLY=1      attribute 113 is 0 (read by each call)
 * Tests ask it through standin_count, standin_log, standin_fail, standin_capture.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifdef WITH_CUDA_H
#include <cuda.h>
typedef CUmemGenericAllocationHandle CUhandle;
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUmemAllocationGranularity_flags, CUmemAllocationHandleType, CUstreamCaptureMode;
typedef unsigned long long CUdeviceptr, CUhandle;
typedef void *CUcontext, *CUstream, *CUevent;
typedef struct { char bytes[16]; } CUuuid;
typedef struct { int type, id; } CUmemLocation;
typedef struct {
    int type, requestedHandleTypes;
    CUmemLocation location;
    void *win32HandleMetaData;
    struct { unsigned char compressionType, gpuDirectRDMACapable; unsigned short usage; unsigned char reserved[4]; } allocFlags;
} CUmemAllocationProp;
typedef struct { CUmemLocation location; int flags; } CUmemAccessDesc;
typedef struct {
    size_t srcXInBytes, srcY; int srcMemoryType; const void *srcHost; CUdeviceptr srcDevice; void *srcArray; size_t srcPitch;
    size_t dstXInBytes, dstY; int dstMemoryType; void *dstHost; CUdeviceptr dstDevice; void *dstArray; size_t dstPitch;
    size_t WidthInBytes, Height;
} CUDA_MEMCPY2D;
#endif


enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_READY = 600,
    ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, CAPTURE_UNSUPPORTED = 900, CARDS_MAX = 16, RELAXED = 2 };

/* -- what the environment says */

enum {
#define PRICE(name, value, unit, source) name,
#include "prices.h"
#undef PRICE
    PRICES_COUNT
};
static struct { const char *name; double value; const char *unit, *source; } prices[] = {
#define PRICE(name, value, unit, source) {#name, value, unit, source},
#include "prices.h"
#undef PRICE
};
static int is_priced, moves_nothing, cards_count = 1, visible[CARDS_MAX], visible_count, nodes[CARDS_MAX];
static size_t total, unit, used[CARDS_MAX];
static pid_t owner;
static int sticky, sticky_code, capture, copies_until_sticky = -1;
static __thread int capture_mode;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER, pinning = PTHREAD_MUTEX_INITIALIZER;

static double number(const char *name, double otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtod(text, NULL) : otherwise;
}
static void uuid_of(int card, char out[16]) { memset(out, 0x5a, 16); out[15] = (char)card; }
static void uuid_text(int card, char out[41]) {
    char raw[16];
    uuid_of(card, raw);
    out += sprintf(out, "GPU-");
    for (int i = 0; i < 16; i++) out += sprintf(out, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", raw[i]);
}
static void read_visible(void) { /* as the driver reads it: up to the first that is not there */
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    visible_count = 0;
    if (!text) while (visible_count < cards_count) visible[visible_count] = visible_count, visible_count++;
    while (text && *text && visible_count < CARDS_MAX) {
        size_t length = strcspn(text, ",");
        int found = -1;
        for (int card = 0; card < cards_count; card++) {
            char name[41], digits[12];
            uuid_text(card, name);
            snprintf(digits, sizeof digits, "%d", card);
            if ((length == strlen(digits) && !strncmp(text, digits, length)) || (length > 4 && !strncmp(text, name, length))) found = card;
        }
        if (found < 0) return;
        visible[visible_count++] = found;
        text += length + (text[length] == ',');
    }
}
static void read_environment(void) {
    is_priced = number("STANDIN_PRICES", 0) != 0;
    moves_nothing = number("STANDIN_MOVES_NOTHING", 0) != 0;
    cards_count = (int)number("STANDIN_DEVICES", 1);
    if (cards_count > CARDS_MAX) cards_count = CARDS_MAX;
    total = (size_t)number("STANDIN_MEMORY", 1 << 30);
    unit = (size_t)number("STANDIN_GRANULARITY", 65536);
    for (int i = 0; i < PRICES_COUNT; i++) {
        char name[64];
        snprintf(name, sizeof name, "STANDIN_%s", prices[i].name);
        prices[i].value = number(name, prices[i].value);
    }
    const char *text = getenv("STANDIN_NODES");
    for (int i = 0; i < CARDS_MAX; i++) {
        nodes[i] = text && *text ? (int)strtol(text, (char **)&text, 10) : 0;
        if (text && *text == ',') text++;
    }
    if ((text = getenv("STANDIN_STICKY")) && sscanf(text, "%d@%d", &sticky_code, &copies_until_sticky) != 2) copies_until_sticky = -1;
    read_visible();
}

/* -- what is told of it */

typedef struct {
    int kind, card; /* 1 copy, 2 page-lock, 3 unlock, 4 copy from memory that is not page-locked, 5 copy out */
    long thread;
    double asked_s, began_s, ended_s; /* CLOCK_MONOTONIC, as Python's time.monotonic */
    unsigned long long dst, src, nbytes;
} Entry;
static Entry entries[1 << 16];
static int entries_count;
static struct { const char *name; long count; } counts[64];

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static void spend(double seconds) { /* CPU where it is short, else sleep: a real call of that length waits for a lock or a card */
    if (!is_priced || seconds <= 0) return;
    double until = now_s() + seconds;
    if (seconds > 50e-6) {
        struct timespec t = {(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))};
        while (nanosleep(&t, &t) && errno == EINTR) {}
    }
    while (now_s() < until) {}
}
static void tell(int kind, int card, double asked, double began, double ended, const void *dst, const void *src, size_t n) {
    if (entries_count < (int)(sizeof entries / sizeof *entries))
        entries[entries_count++] = (Entry){kind, card, syscall(SYS_gettid), asked, began, ended, (uintptr_t)dst, (uintptr_t)src, n};
}
long standin_count(const char *name) {
    for (int i = 0; i < 64 && counts[i].name; i++)
        if (!strcmp(counts[i].name, name)) return counts[i].count;
    return 0;
}
int standin_log(Entry *out, int most) {
    pthread_mutex_lock(&lock);
    int n = entries_count < most ? entries_count : most;
    memcpy(out, entries, (size_t)n * sizeof *out);
    pthread_mutex_unlock(&lock);
    return n;
}
void standin_forget(void) {
    pthread_mutex_lock(&lock);
    entries_count = 0;
    memset(counts, 0, sizeof counts);
    pthread_mutex_unlock(&lock);
}
void standin_fail(int code) { sticky = code; }
int standin_capture(int begin) { /* 0 none, 1 a graph is being captured, 2 the capture was broken; begin < 0: only asks */
    int was = capture;
    if (begin >= 0) capture = begin;
    return was;
}
int standin_price(int i, const char **name, double *value, const char **unit_, const char **source) {
    if (i < 0 || i >= PRICES_COUNT) return 0;
    *name = prices[i].name, *value = prices[i].value, *unit_ = prices[i].unit, *source = prices[i].source;
    return 1;
}

static int enter(const char *name, double us, int breaks_capture) {
    if (owner && owner != getpid()) return NOT_INITIALIZED;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 64; i++)
        if (!counts[i].name || counts[i].name == name) { counts[i].name = name; counts[i].count++; break; }
    pthread_mutex_unlock(&lock);
    if (sticky) return sticky;
    if (breaks_capture && capture && capture_mode != RELAXED) { capture = 2; return CAPTURE_UNSUPPORTED; }
    spend(us * 1e-6);
    return OK;
}
#define ENTER_AT(us, breaks) { int refused = enter(__func__, us, breaks); if (refused) return refused; }
#define ENTER ENTER_AT(prices[CALL_US].value, 0)
#define ENTER_VMM ENTER_AT(prices[VMM_CALL_US].value, 0)
#define ENTER_UNSAFE ENTER_AT(prices[CALL_US].value, 1)

/* -- contexts and cards */

static __thread void *current, *before[8];
static __thread int depth;
static char context_marks[CARDS_MAX];
#define CARD ((int)((char *)current - context_marks)) /* of this machine, whatever this process calls it */
#define NEED_CONTEXT if (!current) return INVALID_CONTEXT
static int is_visible(int ordinal) { return ordinal >= 0 && ordinal < visible_count; }

CUresult cuInit(unsigned flags) {
    if (owner && owner != getpid()) return NOT_INITIALIZED;
    owner = getpid();
    read_environment();
    return flags ? INVALID_VALUE : OK;
}
CUresult cuGetErrorName(CUresult e, const char **s) {
    static const struct { int code; const char *name; } names[] = {{1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {3, "CUDA_ERROR_NOT_INITIALIZED"}, {101, "CUDA_ERROR_INVALID_DEVICE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"}, {214, "CUDA_ERROR_ECC_UNCORRECTABLE"},
        {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {719, "CUDA_ERROR_LAUNCH_FAILED"}, {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
    *s = "CUDA_ERROR";
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == (int)e) *s = names[i].name;
    return OK;
}
CUresult cuDriverGetVersion(int *v) { *v = (int)number("STANDIN_CUDA", 12040); return OK; }
CUresult cuDeviceGetCount(int *n) { *n = visible_count; return OK; }
CUresult cuDeviceGet(CUdevice *d, int ordinal) { *d = ordinal; return is_visible(ordinal) ? OK : INVALID_DEVICE; }
CUresult cuDeviceGetName(char *s, int n, CUdevice d) { strncpy(s, is_priced ? "modelled device" : "stand-in", n); return is_visible(d) ? OK : INVALID_DEVICE; }
CUresult cuDeviceGetUuid_v2(CUuuid *u, CUdevice d) {
    ENTER;
    if (!is_visible(d)) return INVALID_DEVICE;
    uuid_of(visible[d], u->bytes);
    return OK;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
    ENTER;
    if (!is_visible(d)) return INVALID_DEVICE;
    *c = (CUcontext)&context_marks[visible[d]];
    return OK;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice d) { ENTER; return is_visible(d) ? OK : INVALID_DEVICE; }
CUresult cuCtxPushCurrent_v2(CUcontext c) {
    ENTER;
    if ((char *)c < context_marks || (char *)c >= context_marks + CARDS_MAX || depth == 8) return INVALID_VALUE;
    before[depth++] = current;
    current = c;
    return OK;
}
CUresult cuCtxPopCurrent_v2(CUcontext *c) {
    if (!depth) return INVALID_CONTEXT;
    *c = current;
    current = before[--depth];
    return OK;
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    int was = capture_mode;
    ENTER;
    capture_mode = (int)*mode;
    *mode = was;
    return OK;
}
static unsigned long seen_inodes[1 << 16];
static int seen_count;
static size_t counted(unsigned long inode, size_t n) { /* n if it was not seen before */
    for (int i = 0; i < seen_count; i++)
        if (seen_inodes[i] == inode) return 0;
    if (seen_count < (int)(sizeof seen_inodes / sizeof *seen_inodes)) seen_inodes[seen_count++] = inode;
    return n;
}
static void name_granule(int card, char out[64], const char *before, const char *after) {
    const char *name = getenv("STANDIN_CENSUS");
    snprintf(out, 64, "%sstandin-%d%s%.20s%s", before, card, name ? "." : "", name ? name : "", after);
}
static size_t held_by_anybody(int card) {
    char path[300], target[64], line[512], word[64];
    size_t sum = 0;
    DIR *processes = opendir("/proc");
    struct dirent *entry, *file;
    seen_count = 0;
    name_granule(card, word, "/memfd:", " ");
    while (processes && (entry = readdir(processes))) {
        if (entry->d_name[0] < '0' || entry->d_name[0] > '9') continue;
        snprintf(path, sizeof path, "/proc/%s/fd", entry->d_name);
        DIR *files = opendir(path);
        while (files && (file = readdir(files))) {
            struct stat found;
            memset(target, 0, sizeof target);
            if (readlinkat(dirfd(files), file->d_name, target, sizeof target - 1) < 0 || strncmp(target, word, strlen(word))) continue;
            if (!fstatat(dirfd(files), file->d_name, &found, 0)) sum += counted(found.st_ino, (size_t)found.st_size);
        }
        if (files) closedir(files);
        snprintf(path, sizeof path, "/proc/%s/maps", entry->d_name);
        FILE *maps = fopen(path, "r");
        unsigned long first, last, inode;
        while (maps && fgets(line, sizeof line, maps)) /* of a granule all is mapped, or nothing */
            if (strstr(line, word) && sscanf(line, "%lx-%lx %*s %*s %*s %lu", &first, &last, &inode) == 3) sum += counted(inode, last - first);
        if (maps) fclose(maps);
    }
    if (processes) closedir(processes);
    return sum;
}
CUresult cuMemGetInfo_v2(size_t *f, size_t *t) {
    ENTER; NEED_CONTEXT;
    *t = total;
    pthread_mutex_lock(&lock);
    size_t taken = getenv("STANDIN_CENSUS") ? held_by_anybody(CARD) : used[CARD];
    pthread_mutex_unlock(&lock);
    *f = total / 2 > taken ? total / 2 - taken : 0;
    return OK;
}

/* -- page-locked memory */

static struct Locked { char *at; size_t n; int is_ours; } *locked;
static int locked_count, locked_room;
static int find_locked(const void *p, size_t n) { /* the range that has all of it, or -1 */
    for (int i = 0; i < locked_count; i++)
        if (locked[i].at <= (char *)p && (char *)p + n <= locked[i].at + locked[i].n) return i;
    return -1;
}
static int add_locked(char *at, size_t n, int is_ours) {
    pthread_mutex_lock(&lock);
    int result = OK;
    for (int i = 0; i < locked_count; i++)
        if (locked[i].at < at + n && at < locked[i].at + locked[i].n) result = ALREADY_REGISTERED;
    if (result == OK) {
        if (locked_count == locked_room) locked = realloc(locked, sizeof *locked * (size_t)(locked_room = 2 * locked_room + 64));
        locked[locked_count++] = (struct Locked){at, n, is_ours};
    }
    pthread_mutex_unlock(&lock);
    return result;
}
static size_t remove_locked(const void *at, int is_ours) {
    size_t n = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < locked_count; i++)
        if (locked[i].at == at && locked[i].is_ours == is_ours) { n = locked[i].n; locked[i] = locked[--locked_count]; break; }
    pthread_mutex_unlock(&lock);
    return n;
}
static void pay_pinning(int kind, double seconds, const void *at, size_t n) { /* one at a time: the driver and the kernel each hold a lock */
    double asked = now_s();
    pthread_mutex_lock(&pinning);
    double began = now_s();
    spend(seconds);
    pthread_mutex_lock(&lock);
    tell(kind, current ? CARD : -1, asked, began, now_s(), at, NULL, n);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&pinning);
}
static size_t untouched(char *p, size_t n) { /* bytes of pages that are not there yet */
    static __thread unsigned char there[16384];
    size_t missing = 0;
    for (size_t at = 0; at < n; at += sizeof there * 4096) {
        size_t part = n - at < sizeof there * 4096 ? n - at : sizeof there * 4096;
        if (mincore(p + at, part, there)) return 0;
        for (size_t i = 0; i < part / 4096; i++) missing += there[i] & 1 ? 0 : 4096;
    }
    return missing;
}
static void touch(char *p, size_t n, int for_writing) { /* as pinning does, in the caller's thread; nothing is filled in where nothing moves */
    if (moves_nothing) { spend(1e-9 * (double)untouched(p, n) * prices[TOUCH_S_GB].value); return; }
    for (volatile char *at = p; at < p + n; at += 4096) if (for_writing) *at = *at; else (void)*at;
}
static int is_writable(void *p) { /* as the kernel would find out: by pinning the page for writing */
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512], rights[8];
    unsigned long first, last;
    int found = 0;
    while (maps && fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%lx %7s", &first, &last, rights) == 3 && first <= (unsigned long)p && (unsigned long)p < last) found = rights[1] == 'w';
    if (maps) fclose(maps);
    return found;
}
CUresult cuMemHostAlloc(void **p, size_t n, unsigned flags) {
    ENTER_UNSAFE; NEED_CONTEXT;
    if (flags != 1 || posix_memalign(p, 4096, n)) return INVALID_VALUE;
    pay_pinning(2, prices[PIN_CALL_US].value * 1e-6 + prices[PIN_S_GB].value * 1e-9 * (double)n, *p, n);
    return add_locked(*p, n, 1);
}
CUresult cuMemFreeHost(void *p) {
    ENTER_UNSAFE; NEED_CONTEXT;
    size_t n = remove_locked(p, 1);
    if (!n) return INVALID_VALUE;
    pay_pinning(3, prices[UNPIN_S_GB].value * 1e-9 * (double)n, p, n);
    free(p);
    return OK;
}
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute attribute, CUdevice d) {
    ENTER;
    if (!is_visible(d)) return INVALID_DEVICE;
    switch ((int)attribute) {
    case 20: *v = (int)number("STANDIN_COMPUTE_MODE", 0); return OK;
    case 32: *v = 1; return OK;
    case 33: *v = 0x65 + visible[d]; return OK;
    case 34: case 50: *v = 0; return OK;
    case 75: *v = (int)number("STANDIN_CAPABILITY", 80) / 10; return OK;
    case 76: *v = (int)number("STANDIN_CAPABILITY", 80) % 10; return OK;
    case 103: *v = 1; return OK;
    case 113: *v = !getenv("STANDIN_NO_READ_ONLY"); return OK;
    case 134: *v = nodes[visible[d]]; return OK; /* CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID */
    default: return INVALID_VALUE;
    }
}
CUresult cuMemHostRegister_v2(void *p, size_t n, unsigned flags) {
    ENTER_UNSAFE; NEED_CONTEXT;
    if (!n || (uintptr_t)p % 4096 || n % 4096 || (flags & 8 && getenv("STANDIN_NO_READ_ONLY"))) return INVALID_VALUE;
    if ((flags & ~8u) != 1 || (!(flags & 8) && !is_writable(p))) return INVALID_VALUE;
    int result = add_locked(p, n, 0);
    if (result == OK && is_priced) touch(p, n, !(flags & 8));
    if (result == OK) pay_pinning(2, prices[REGISTER_S_GB].value * 1e-9 * (double)n, p, n);
    return result;
}
CUresult cuMemHostUnregister(void *p) {
    ENTER_UNSAFE; NEED_CONTEXT;
    size_t n = remove_locked(p, 0);
    if (n) pay_pinning(3, prices[UNPIN_S_GB].value * 1e-9 * (double)n, p, n);
    return n ? OK : NOT_REGISTERED;
}

/* -- streams, events and the copy engines */

typedef struct { int card; double ready_s; } Stream;
typedef struct { int polls; double at_s; } Event;
typedef struct Pending { struct Pending *next; double ended_s; CUDA_MEMCPY2D copy; } Pending;
static struct { double free_s[2]; Pending *first; } engines[CARDS_MAX]; /* free_s: of the engine in, and of that out */
enum { INSIDE = -1, IN, OUT };

static void move_rows(const CUDA_MEMCPY2D *c) {
    if (moves_nothing) return;
    for (size_t y = 0; y < c->Height; y++)
        memcpy((char *)(c->dstDevice ? (void *)c->dstDevice : c->dstHost) + y * c->dstPitch,
            (const char *)(c->srcHost ? c->srcHost : (void *)c->srcDevice) + y * c->srcPitch, c->WidthInBytes);
}
static void finish(double now) { /* move the bytes of copies that have ended by now; the lock is held */
    for (int card = 0; card < CARDS_MAX; card++)
        while (engines[card].first && engines[card].first->ended_s <= now) {
            Pending *done = engines[card].first;
            engines[card].first = done->next;
            move_rows(&done->copy);
            free(done);
        }
}
static int node_of(const void *p) {
    int node = -1;
    syscall(SYS_get_mempolicy, &node, NULL, 0, p, 3 /* MPOL_F_NODE | MPOL_F_ADDR */);
    return node;
}
static CUresult queue(const CUDA_MEMCPY2D *c, Stream *s, int way) {
    int crosses_bus = way != INSIDE;
    const void *host = way == OUT ? c->dstHost : c->srcHost;
    size_t n = c->WidthInBytes * c->Height;
    if (!s) return INVALID_VALUE;
    if (copies_until_sticky > 0 && !--copies_until_sticky) sticky = sticky_code;
    if (!is_priced) { move_rows(c); return OK; }
    double asked = now_s();
    pthread_mutex_lock(&lock);
    size_t span = c->Height ? (c->Height - 1) * c->srcPitch + c->WidthInBytes : 0;
    int is_locked = !crosses_bus || find_locked(host, span) >= 0;
    if (!is_locked) {
        pthread_mutex_unlock(&lock);
        spend(1e-9 * (double)n / prices[PAGEABLE_GB_S].value);
        pthread_mutex_lock(&lock);
        move_rows(c);
        tell(4, s->card, asked, asked, now_s(), (void *)c->dstDevice, c->srcHost, n);
        pthread_mutex_unlock(&lock);
        return OK;
    }
    int is_far = crosses_bus && nodes[s->card] && node_of(host) != nodes[s->card];
    double rate = prices[is_far ? FAR_LINK_GB_S : LINK_GB_S].value * (crosses_bus ? 1e9 : 2e10); /* inside the card: 20 links */
    double began = asked > s->ready_s ? asked : s->ready_s;
    if (crosses_bus && engines[s->card].free_s[way] > began) began = engines[s->card].free_s[way];
    double ended = began + prices[COPY_US].value * 1e-6 + (double)n / rate;
    if (crosses_bus) engines[s->card].free_s[way] = ended;
    s->ready_s = ended;
    if (way == OUT) tell(5, s->card, asked, began, ended, c->dstHost, (void *)c->srcDevice, n);
    else tell(1, s->card, asked, began, ended, (void *)c->dstDevice, c->srcHost, n);
    if (!moves_nothing) {
        Pending *more = calloc(1, sizeof *more), **at = &engines[s->card].first;
        more->ended_s = ended, more->copy = *c;
        while (*at && (*at)->ended_s <= ended) at = &(*at)->next;
        more->next = *at;
        *at = more;
        finish(now_s());
    }
    pthread_mutex_unlock(&lock);
    return OK;
}
static CUDA_MEMCPY2D plain(CUdeviceptr d, const void *s, size_t n) {
    CUDA_MEMCPY2D c = {0};
    c.srcHost = s, c.dstDevice = d, c.srcPitch = c.dstPitch = c.WidthInBytes = n, c.Height = 1;
    return c;
}
static void wait_until(double at) {
    double left = at - now_s();
    if (left > 0) spend(left);
    pthread_mutex_lock(&lock);
    finish(now_s());
    pthread_mutex_unlock(&lock);
}
CUresult cuStreamCreate(CUstream *s, unsigned flags) {
    ENTER; NEED_CONTEXT;
    Stream *made = calloc(1, sizeof *made);
    made->card = CARD;
    *s = (CUstream)made;
    return flags == 1 ? OK : INVALID_VALUE;
}
CUresult cuStreamSynchronize(CUstream s) {
    ENTER_UNSAFE; NEED_CONTEXT;
    if (!s) return INVALID_VALUE;
    wait_until(((Stream *)s)->ready_s);
    return OK;
}
CUresult cuStreamDestroy_v2(CUstream s) { ENTER; NEED_CONTEXT; free(s); return OK; }
static void wait_for_card(int card) { wait_until(engines[card].free_s[engines[card].free_s[OUT] > engines[card].free_s[IN]]); }
CUresult cuCtxSynchronize(void) { ENTER_UNSAFE; NEED_CONTEXT; wait_for_card(CARD); return OK; }
CUresult cuEventCreate(CUevent *e, unsigned flags) { ENTER; NEED_CONTEXT; *e = calloc(1, sizeof(Event)); return flags == 2 ? OK : INVALID_VALUE; }
CUresult cuEventRecord(CUevent e, CUstream s) {
    ENTER; NEED_CONTEXT;
    if (!s) return INVALID_VALUE;
    ((Event *)e)->at_s = ((Stream *)s)->ready_s;
    ((Event *)e)->polls = 0;
    return OK;
}
CUresult cuEventQuery(CUevent e) {
    ENTER_UNSAFE; NEED_CONTEXT;
    Event *event = (Event *)e;
    if (!is_priced) return ++event->polls < 3 ? NOT_READY : OK;
    double now = now_s();
    pthread_mutex_lock(&lock);
    finish(now);
    pthread_mutex_unlock(&lock);
    return event->at_s <= now ? OK : NOT_READY;
}
CUresult cuEventDestroy_v2(CUevent e) { ENTER; NEED_CONTEXT; free(e); return OK; }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void *s, size_t n, CUstream stream) {
    ENTER_AT(prices[MEMCPY_CALL_US].value, 0); NEED_CONTEXT;
    CUDA_MEMCPY2D copy = plain(d, s, n);
    return queue(&copy, (Stream *)stream, IN);
}
CUresult cuMemcpyDtoHAsync_v2(void *d, CUdeviceptr s, size_t n, CUstream stream) {
    ENTER_AT(prices[MEMCPY_CALL_US].value, 0); NEED_CONTEXT;
    CUDA_MEMCPY2D copy = plain(0, NULL, n);
    copy.dstHost = d, copy.srcDevice = s;
    return queue(&copy, (Stream *)stream, OUT);
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream stream) {
    ENTER_AT(prices[MEMCPY_CALL_US].value, 0); NEED_CONTEXT;
    CUDA_MEMCPY2D copy = plain(d, (const void *)s, n);
    return queue(&copy, (Stream *)stream, INSIDE);
}
CUresult cuMemcpyDtoH_v2(void *d, CUdeviceptr s, size_t n) {
    ENTER_UNSAFE; NEED_CONTEXT;
    if (is_priced) wait_for_card(CARD);
    memcpy(d, (void *)s, n);
    return OK;
}
CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *c, CUstream stream) {
    ENTER_AT(prices[MEMCPY_CALL_US].value, 0); NEED_CONTEXT;
    if (c->srcMemoryType != 1 || c->dstMemoryType != 2 || c->srcXInBytes || c->srcY || c->dstXInBytes || c->dstY) return INVALID_VALUE;
    if (c->WidthInBytes > c->srcPitch || c->WidthInBytes > c->dstPitch || !stream) return INVALID_VALUE;
    return queue(c, (Stream *)stream, IN);
}

/* -- virtual memory: a granule is a memfd, named after its card, so that it is known wherever it is imported */

static int is_plain(const CUmemAllocationProp *p) {
    return p->type == 1 && p->requestedHandleTypes == 1 && p->location.type == 1 && is_visible(p->location.id) && !p->win32HandleMetaData
        && !p->allocFlags.compressionType && !p->allocFlags.usage;
}
static const CUhandle MADE_HERE = (CUhandle)1 << 40;
static CUhandle handle_of(int card, int fd) { return ((CUhandle)(card + 1) << 32) + (CUhandle)fd; } /* wider than 32 bits, as real ones may be */
static int card_of(CUhandle h) { return (int)(h >> 32 & 255) - 1; }
CUresult cuMemGetAllocationGranularity(size_t *g, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags option) {
    ENTER; NEED_CONTEXT;
    *g = unit;
    return is_plain(p) && !option ? OK : INVALID_VALUE;
}
CUresult cuMemAddressReserve(CUdeviceptr *p, size_t n, size_t align, CUdeviceptr at, unsigned long long flags) {
    ENTER; NEED_CONTEXT;
    if (!n || n % unit || align || at || flags) return INVALID_VALUE;
    *p = (CUdeviceptr)mmap(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return OK;
}
CUresult cuMemAddressFree(CUdeviceptr p, size_t n) { ENTER; NEED_CONTEXT; return munmap((void *)p, n) ? INVALID_VALUE : OK; }
CUresult cuMemCreate(CUhandle *h, size_t n, const CUmemAllocationProp *p, unsigned long long flags) {
    ENTER_VMM; NEED_CONTEXT;
    if (n % unit || flags || !is_plain(p)) return INVALID_VALUE;
    int card = visible[p->location.id];
    char name[64];
    name_granule(card, name, "", "");
    int fd = memfd_create(name, MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, n)) return OUT_OF_MEMORY;
    used[card] += n;
    *h = MADE_HERE | handle_of(card, fd);
    return OK;
}
CUresult cuMemRelease(CUhandle h) {
    ENTER_VMM; NEED_CONTEXT;
    off_t n = lseek((int)h, 0, SEEK_END);
    if (card_of(h) < 0 || card_of(h) >= CARDS_MAX || close((int)h)) return INVALID_VALUE;
    if (h & MADE_HERE) used[card_of(h)] -= (size_t)n; /* too early where others still map it: as much as this model knows */
    return OK;
}
CUresult cuMemMap(CUdeviceptr p, size_t n, size_t offset, CUhandle h, unsigned long long flags) {
    ENTER_VMM; NEED_CONTEXT;
    if (card_of(h) < 0 || card_of(h) >= CARDS_MAX || offset || flags) return INVALID_VALUE;
    if (card_of(h) != CARD) return INVALID_DEVICE; /* a real one maps it for the other card, over their link: nobody here means to */
    return mmap((void *)p, n, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)h, 0) == MAP_FAILED ? INVALID_VALUE : OK;
}
CUresult cuMemUnmap(CUdeviceptr p, size_t n) {
    ENTER_VMM; NEED_CONTEXT;
    return mmap((void *)p, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED ? INVALID_VALUE : OK;
}
CUresult cuMemSetAccess(CUdeviceptr p, size_t n, const CUmemAccessDesc *d, size_t count) {
    ENTER_VMM; NEED_CONTEXT;
    if (count != 1 || d->location.type != 1 || !is_visible(d->location.id) || visible[d->location.id] != CARD || ((int)d->flags != 1 && (int)d->flags != 3))
        return INVALID_VALUE;
    return mprotect((void *)p, n, (int)d->flags == 3 ? PROT_READ | PROT_WRITE : PROT_READ) ? INVALID_VALUE : OK;
}
CUresult cuMemExportToShareableHandle(void *out, CUhandle h, CUmemAllocationHandleType type, unsigned long long flags) {
    ENTER_VMM; NEED_CONTEXT;
    if (type != 1 || flags) return INVALID_VALUE;
    *(int *)out = fcntl((int)h, F_DUPFD_CLOEXEC, 0);
    return OK;
}
CUresult cuMemImportFromShareableHandle(CUhandle *h, void *fd, CUmemAllocationHandleType type) {
    ENTER_VMM; NEED_CONTEXT;
    char path[64], target[64] = {0};
    int card;
    snprintf(path, sizeof path, "/proc/self/fd/%d", (int)(intptr_t)fd);
    if (type != 1 || readlink(path, target, sizeof target - 1) < 0 || sscanf(target, "/memfd:standin-%d", &card) != 1) return INVALID_VALUE;
    for (int i = 0; i < visible_count; i++)
        if (visible[i] == card) { *h = handle_of(card, fcntl((int)(intptr_t)fd, F_DUPFD_CLOEXEC, 0)); return OK; }
    return INVALID_DEVICE;
}
