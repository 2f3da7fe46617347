// Lets g++ compile hfmpi/backends/kernels.cu for the host. Every thread is a fiber; a warp's shuffle is a meeting
// of its 32 fibers, a barrier one of its block's. Slow, and enough to run the very source that a GPU would run.
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
#define __align__(bytes)
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __syncthreads barrier
#define __threadfence()
#define PAUSE pause_block

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct Index { unsigned x, y, z; };
extern Index threadIdx, blockIdx, blockDim, gridDim;
extern double shared[];

unsigned long long shuffle(unsigned long long bits, int mask);
void barrier();
void pause_block();
void arrive();
void wait();
void send_bytes(void* place, int block, const void* value, int bytes);

template <typename T>
void send(T* place, int block, T value) {
    send_bytes(place, block, &value, sizeof value);
}

inline void atomicAdd(int* sum, int value) { *sum += value; }

template <typename T>
T __ldcg(const T* place) { return *place; }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    unsigned long long bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = shuffle(bits, mask);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
