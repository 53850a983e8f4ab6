/* A stand-in for libcuda.so.1 on host memory: the calls of gpuload/device/driver.py with the prototypes of cuda.h.
 *
 * It shows that arguments, structs and descriptors cross ctypes as meant, and that granules are mapped, exported and
 * imported in the right order. It shows nothing about a real driver, its speed or its rules beyond those checked here:
 * a context must be current, sizes must be multiples of the granularity, access must be set before use, memory that is
 * mapped read-only must be registered as such, once. With -DWITH_CUDA_H the prototypes are checked against NVIDIA's own.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef WITH_CUDA_H
#include <cuda.h>
typedef CUmemGenericAllocationHandle CUhandle;
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUmemAllocationGranularity_flags, CUmemAllocationHandleType;
typedef unsigned long long CUdeviceptr, CUhandle;
typedef void *CUcontext, *CUstream, *CUevent;
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

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, TOTAL = 1 << 30, UNIT = 65536 };
static __thread void *current, *before[8];
static __thread int depth;
static int context_mark;
#define NEED_CONTEXT if (current != &context_mark) return INVALID_CONTEXT

CUresult cuInit(unsigned flags) { return flags ? INVALID_VALUE : OK; }
CUresult cuGetErrorName(CUresult e, const char **s) {
    *s = (int)e == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : (int)e == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR";
    return OK;
}
static int told(const char *name, int otherwise) { const char *s = getenv(name); return s ? atoi(s) : otherwise; }
CUresult cuDriverGetVersion(int *v) { *v = told("STANDIN_CUDA", 12040); return OK; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return OK; }
CUresult cuDeviceGet(CUdevice *d, int ordinal) { *d = ordinal; return ordinal ? INVALID_VALUE : OK; }
CUresult cuDeviceGetName(char *s, int n, CUdevice d) { strncpy(s, "stand-in", n); return d ? INVALID_VALUE : OK; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)&context_mark; return d ? INVALID_VALUE : OK; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice d) { return d ? INVALID_VALUE : OK; }
CUresult cuCtxPushCurrent_v2(CUcontext c) {
    if (!c || depth == 8) return INVALID_VALUE;
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
CUresult cuCtxSynchronize(void) { NEED_CONTEXT; return OK; }
CUresult cuMemGetInfo_v2(size_t *f, size_t *t) { NEED_CONTEXT; *t = TOTAL; *f = TOTAL / 2; return OK; }
CUresult cuMemHostAlloc(void **p, size_t n, unsigned flags) {
    NEED_CONTEXT;
    return flags != 1 || posix_memalign(p, 4096, n) ? INVALID_VALUE : OK;
}
static struct { char *at; size_t n; } registered[64];
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
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute attribute, CUdevice d) {
    if (d) return INVALID_VALUE;
    switch ((int)attribute) {
    case 20: *v = told("STANDIN_COMPUTE_MODE", 0); return OK;
    case 32: *v = 1; return OK;
    case 33: *v = 0x65; return OK;
    case 34: case 50: *v = 0; return OK;
    case 75: *v = told("STANDIN_CAPABILITY", 80) / 10; return OK;
    case 76: *v = told("STANDIN_CAPABILITY", 80) % 10; return OK;
    case 103: *v = 1; return OK;
    case 113: *v = !getenv("STANDIN_NO_READ_ONLY"); return OK;
    default: return INVALID_VALUE;
    }
}
CUresult cuMemHostRegister_v2(void *p, size_t n, unsigned flags) {
    NEED_CONTEXT;
    if (!n || (uintptr_t)p % 4096 || n % 4096 || (flags & 8 && getenv("STANDIN_NO_READ_ONLY"))) return INVALID_VALUE;
    if ((flags & ~8u) != 1 || (!(flags & 8) && !is_writable(p))) return INVALID_VALUE;
    for (int i = 0; i < 64; i++)
        if (registered[i].n && registered[i].at < (char *)p + n && (char *)p < registered[i].at + registered[i].n) return ALREADY_REGISTERED;
    for (int i = 0; i < 64; i++)
        if (!registered[i].n) { registered[i].at = p; registered[i].n = n; return OK; }
    return OUT_OF_MEMORY;
}
CUresult cuMemHostUnregister(void *p) {
    NEED_CONTEXT;
    for (int i = 0; i < 64; i++)
        if (registered[i].n && registered[i].at == p) { registered[i].n = 0; return OK; }
    return NOT_REGISTERED;
}
CUresult cuMemFreeHost(void *p) { NEED_CONTEXT; free(p); return OK; }
CUresult cuStreamCreate(CUstream *s, unsigned flags) { NEED_CONTEXT; *s = malloc(1); return flags == 1 ? OK : INVALID_VALUE; }
CUresult cuStreamSynchronize(CUstream s) { NEED_CONTEXT; return s ? OK : INVALID_VALUE; }
CUresult cuStreamDestroy_v2(CUstream s) { NEED_CONTEXT; free(s); return OK; }
CUresult cuEventCreate(CUevent *e, unsigned flags) { NEED_CONTEXT; *e = calloc(1, 1); return flags == 2 ? OK : INVALID_VALUE; }
CUresult cuEventRecord(CUevent e, CUstream s) { NEED_CONTEXT; *(char *)e = 1; return s ? OK : INVALID_VALUE; }
CUresult cuEventQuery(CUevent e) { NEED_CONTEXT; return ++*(char *)e < 4 ? 600 : (*(char *)e = 3, OK); }
CUresult cuEventDestroy_v2(CUevent e) { NEED_CONTEXT; free(e); return OK; }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void *s, size_t n, CUstream stream) {
    NEED_CONTEXT;
    memcpy((void *)d, s, n);
    return stream ? OK : INVALID_VALUE;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream stream) {
    return cuMemcpyHtoDAsync_v2(d, (void *)s, n, stream);
}
CUresult cuMemcpyDtoH_v2(void *d, CUdeviceptr s, size_t n) { NEED_CONTEXT; memcpy(d, (void *)s, n); return OK; }
CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *c, CUstream stream) {
    NEED_CONTEXT;
    if (c->srcMemoryType != 1 || c->dstMemoryType != 2 || c->srcXInBytes || c->srcY || c->dstXInBytes || c->dstY) return INVALID_VALUE;
    if (c->WidthInBytes > c->srcPitch || c->WidthInBytes > c->dstPitch || !stream) return INVALID_VALUE;
    for (size_t y = 0; y < c->Height; y++)
        memcpy((char *)c->dstDevice + y * c->dstPitch, (const char *)c->srcHost + y * c->srcPitch, c->WidthInBytes);
    return OK;
}
static int is_plain(const CUmemAllocationProp *p) {
    return p->type == 1 && p->requestedHandleTypes == 1 && p->location.type == 1 && !p->location.id && !p->win32HandleMetaData
        && !p->allocFlags.compressionType && !p->allocFlags.usage;
}
CUresult cuMemGetAllocationGranularity(size_t *g, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags option) {
    NEED_CONTEXT;
    *g = UNIT;
    return is_plain(p) && !option ? OK : INVALID_VALUE;
}
CUresult cuMemAddressReserve(CUdeviceptr *p, size_t n, size_t align, CUdeviceptr at, unsigned long long flags) {
    NEED_CONTEXT;
    if (!n || n % UNIT || align || at || flags) return INVALID_VALUE;
    *p = (CUdeviceptr)mmap(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return OK;
}
CUresult cuMemAddressFree(CUdeviceptr p, size_t n) { NEED_CONTEXT; return munmap((void *)p, n) ? INVALID_VALUE : OK; }
CUresult cuMemCreate(CUhandle *h, size_t n, const CUmemAllocationProp *p, unsigned long long flags) {
    NEED_CONTEXT;
    if (n % UNIT || flags || !is_plain(p)) return INVALID_VALUE;
    int fd = memfd_create("standin", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, n)) return OUT_OF_MEMORY;
    *h = ((CUhandle)1 << 32) + fd; /* wider than 32 bits, as real ones may be */
    return OK;
}
CUresult cuMemRelease(CUhandle h) { NEED_CONTEXT; return close((int)h) ? INVALID_VALUE : OK; }
CUresult cuMemMap(CUdeviceptr p, size_t n, size_t offset, CUhandle h, unsigned long long flags) {
    NEED_CONTEXT;
    if (h >> 32 != 1 || offset || flags) return INVALID_VALUE;
    return mmap((void *)p, n, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)h, 0) == MAP_FAILED ? INVALID_VALUE : OK;
}
CUresult cuMemUnmap(CUdeviceptr p, size_t n) {
    NEED_CONTEXT;
    return mmap((void *)p, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED ? INVALID_VALUE : OK;
}
CUresult cuMemSetAccess(CUdeviceptr p, size_t n, const CUmemAccessDesc *d, size_t count) {
    NEED_CONTEXT;
    if (count != 1 || d->location.type != 1 || d->location.id || (d->flags != 1 && d->flags != 3)) return INVALID_VALUE;
    return mprotect((void *)p, n, d->flags == 3 ? PROT_READ | PROT_WRITE : PROT_READ) ? INVALID_VALUE : OK;
}
CUresult cuMemExportToShareableHandle(void *out, CUhandle h, CUmemAllocationHandleType type, unsigned long long flags) {
    NEED_CONTEXT;
    if (type != 1 || flags) return INVALID_VALUE;
    *(int *)out = fcntl((int)h, F_DUPFD_CLOEXEC, 0);
    return OK;
}
CUresult cuMemImportFromShareableHandle(CUhandle *h, void *fd, CUmemAllocationHandleType type) {
    NEED_CONTEXT;
    if (type != 1) return INVALID_VALUE;
    *h = ((CUhandle)1 << 32) + fcntl((int)(intptr_t)fd, F_DUPFD_CLOEXEC, 0);
    return OK;
}
