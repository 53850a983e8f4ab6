/* Prints the first values of a tensor that a gpuload server holds.
 *
 *     cc -std=c11 -I"$(gpuload include)" "$(gpuload include)/example.c" -o first && ./first llama model.norm.weight
 */
#include "gpuload.h"

#include <inttypes.h>

static double value_of(const gpuload_tensor *t, uint64_t i) {
    float out = 0;
    if (!strcmp(t->dtype, "F32")) {
        memcpy(&out, (const char *)t->data + 4 * i, 4);
    } else if (!strcmp(t->dtype, "BF16")) { /* the upper half of a float */
        uint16_t half;
        uint32_t bits;
        memcpy(&half, (const char *)t->data + 2 * i, 2);
        bits = (uint32_t)half << 16;
        memcpy(&out, &bits, 4);
    }
    return out;
}

int main(int argc, char **argv) {
    gpuload_model model;
    char error[GPULOAD_ERROR_BYTES];
    const gpuload_tensor *t;
    uint64_t i, count = 1;
    if (argc != 3) return fprintf(stderr, "usage: %s MODEL TENSOR\n", argv[0]), 2;
    if (gpuload_attach(&model, NULL, argv[1], NULL, NULL, 60.0, error)) return fprintf(stderr, "%s\n", error), 1;
    t = gpuload_find(&model, argv[2]);
    if (t) {
        printf("%s %s [", t->name, t->dtype);
        for (i = 0; i < t->rank; count *= t->shape[i++]) printf(i ? ", %" PRIu64 : "%" PRIu64, t->shape[i]);
        printf("]:");
        for (i = 0; i < count && i < 5; i++) printf(" %g", value_of(t, i));
        printf("\n");
    }
    gpuload_release(&model);
    return t ? 0 : (fprintf(stderr, "no such tensor: %s\n", argv[2]), 1);
}
