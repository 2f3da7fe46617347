// The one call of the CUDA driver that hfmpi makes itself, with the structures of its documentation.
#include <cstddef>

namespace {
struct Attribute {  // CUlaunchAttribute; its value is a union of 64 bytes
    int id;
    char pad[8 - sizeof(int)];
    union {
        char all[64];
        unsigned dimension[3];
    } value;
};

struct Configuration {  // CUlaunchConfig
    unsigned grid[3], block[3], shared;
    void* stream;
    Attribute* attributes;
    unsigned count;
};
}  // namespace

extern "C" {
int at_once = 2;

int cuOccupancyMaxActiveClusters(int* clusters, void* function, const Configuration* c) {
    const Attribute* a = c->attributes;
    if (!function || c->count != 1 || a->id != 4 || a->value.dimension[1] != 1 || a->value.dimension[2] != 1)
        return 1;  // CUDA_ERROR_INVALID_VALUE
    const unsigned blocks = a->value.dimension[0];
    if (!blocks || c->grid[0] % blocks || c->grid[1] != 1 || c->block[0] > 1024 || c->shared > 227 * 1024) return 1;
    *clusters = at_once;
    return 0;
}
}
