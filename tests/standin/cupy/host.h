// Lets g++ compile hfmpi/backends/kernels.cu for the host. Every thread of a block is a fiber; a warp's shuffle
// is a meeting of its 32 fibers. Slow, and enough to run the very source that a GPU would run.
#include <cmath>
#include <cstddef>
#include <cstring>

using std::exp;
using std::log;
using std::tanh;

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__

struct Index { unsigned x, y, z; };
extern Index threadIdx, blockIdx, blockDim, gridDim;
extern double shared[];

unsigned long long shuffle(unsigned long long bits, int mask);

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    unsigned long long bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = shuffle(bits, mask);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
