/* Attaches, writes every tensor (name, type, shape and bytes, each with its length) to standard output, and releases:
 *     dump MODEL DEVICE DIGEST TIMEOUT_S     '-' for none; the socket by GPULOAD_SOCKET
 * Status: 0, or what gpuload_attach returned, with its one line on standard error. */
#include "gpuload.h"

static void put(const void *bytes, uint64_t n) {
    fwrite(&n, sizeof n, 1, stdout);
    if (n) fwrite(bytes, 1, (size_t)n, stdout);
}

static const char *given(const char *text) { return strcmp(text, "-") ? text : NULL; }

int main(int argc, char **argv) {
    gpuload_model model;
    gpuload_pong pong;
    char error[GPULOAD_ERROR_BYTES] = "";
    uint64_t i;
    int failed;
    if (argc != 5) return 99;
    if (!strcmp(argv[1], "-")) {
        failed = gpuload_ping(NULL, strtod(argv[4], NULL), &pong, error);
        if (!failed) printf("%llu %s", (unsigned long long)pong.protocol, pong.version);
    } else {
        failed = gpuload_attach(&model, NULL, argv[1], given(argv[2]), given(argv[3]), strtod(argv[4], NULL), error);
    }
    if (failed) {
        fprintf(stderr, "%s\n", error);
        return failed;
    }
    if (!strcmp(argv[1], "-")) return 0;
    for (i = 0; i < model.tensors_count; i++) {
        const gpuload_tensor *t = &model.tensors[i];
        if (gpuload_find(&model, t->name) != t) return 98;
        put(t->name, strlen(t->name));
        put(t->dtype, strlen(t->dtype));
        put(t->shape, t->rank * sizeof *t->shape);
        put(t->data, t->nbytes);
    }
    if (gpuload_find(&model, "no such tensor")) return 97;
    gpuload_release(&model);
    gpuload_release(&model);
    return fflush(stdout) ? 96 : 0;
}
