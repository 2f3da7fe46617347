// The fused kernels for NVIDIA GPUs. The mathematics, and the meaning of every array, are those of numpy.py
// and base.py. `real` is float or double (-DREAL=...). All arrays are C-contiguous; a null pointer is an array
// that is not wanted.
//
// Step kernels have one thread an element (b, j) of B sequences and n units. Nothing is added up by atomics,
// so that every sum has one order and the same input gives the same bits.

typedef REAL real;

#define WARP 32
#define ALL_LANES 0xffffffffu

static __device__ __forceinline__ real sigmoid(real a) {
    return real(0.5) * tanh(real(0.5) * a) + real(0.5);
}

static __device__ __forceinline__ int element() { return blockIdx.x * blockDim.x + threadIdx.x; }

// Gated cells: pre-activations in the order i, f, o, u; coefficients k = f, k_i, k_f, k_o, k_u, k_c -----------

extern "C" __global__ void gated_forward(
    int batch, int n, const real* a, const real* table, const int* x, const real* bias_h, real* c, real* h,
    real* k, real* w) {
    const int e = element();
    if (e >= batch * n) return;
    const int b = e / n, j = e % n;
    const real* pre = a + (size_t)b * 4 * n;
    const real* row = table + (size_t)x[b] * 4 * n;
    const real i = sigmoid(pre[j] + row[j]);
    const real f = sigmoid(pre[n + j] + row[n + j]);
    const real o = sigmoid(pre[2 * n + j] + row[2 * n + j]);
    const real a_u = pre[3 * n + j] + row[3 * n + j];
    const real u = bias_h ? a_u : tanh(a_u);
    const real old = c[e];
    const real fresh = f * old + i * u;
    const real s = tanh(bias_h ? o * fresh + bias_h[j] : fresh);
    const real slope = 1 - s * s;
    h[e] = bias_h ? s : o * s;
    c[e] = fresh;
    if (k) {
        const size_t next = (size_t)batch * n;
        k += e;
        k[0] = f;
        k[next] = u * i * (1 - i);
        k[2 * next] = old * f * (1 - f);
        k[3 * next] = (bias_h ? slope * fresh : s) * o * (1 - o);
        k[4 * next] = bias_h ? i : i * (1 - u * u);
        k[5 * next] = o * slope;
    }
    if (w) {  // structural damping: the matching-loss curvature of each unit
        real* weight = w + (size_t)b * 4 * n;
        weight[j] = i * (1 - i);
        weight[n + j] = f * (1 - f);
        weight[2 * n + j] = o * (1 - o);
        weight[3 * n + j] = bias_h ? real(0.25) : real(0.25) * (1 - u * u);
    }
}

extern "C" __global__ void gated_tangent(
    int batch, int n, real* pre, const real* table, const int* x, const real* k, real* dc, real* dh, int add) {
    const int e = element();
    if (e >= batch * n) return;
    const int b = e / n, j = e % n;
    const size_t next = (size_t)batch * n;
    real* own = pre + (size_t)b * 4 * n;
    const real* row = table + (size_t)x[b] * 4 * n;
    k += e;
    const real ri = own[j] + row[j];
    const real rf = own[n + j] + row[n + j];
    const real ro = own[2 * n + j] + row[2 * n + j];
    const real ru = own[3 * n + j] + row[3 * n + j];
    own[j] = ri;
    own[n + j] = rf;
    own[2 * n + j] = ro;
    own[3 * n + j] = ru;
    const real rc = k[0] * dc[e] + k[next] * ri + k[2 * next] * rf + k[4 * next] * ru;
    const real rh = k[3 * next] * ro + k[5 * next] * rc;
    dc[e] = rc;
    dh[e] = add ? dh[e] + rh : rh;
}

extern "C" __global__ void gated_adjoint(
    int batch, int n, real* dh, const real* back, const real* k, real* dc, real* da, int inject) {
    const int e = element();
    if (e >= batch * n) return;
    const int b = e / n, j = e % n;
    const size_t next = (size_t)batch * n;
    real* own = da + (size_t)b * 4 * n;
    k += e;
    const real total = dh[e] + back[e];
    const real state = dc[e] + k[5 * next] * total;
    const real i = k[next] * state, f = k[2 * next] * state, o = k[3 * next] * total, u = k[4 * next] * state;
    dh[e] = total;
    dc[e] = k[0] * state;
    own[j] = inject ? own[j] + i : i;
    own[n + j] = inject ? own[n + j] + f : f;
    own[2 * n + j] = inject ? own[2 * n + j] + o : o;
    own[3 * n + j] = inject ? own[3 * n + j] + u : u;
}

// Plain tanh cells ---------------------------------------------------------------------------------------------

extern "C" __global__ void plain_forward(
    int batch, int n, const real* a, const real* table, const int* x, real* h, real* w) {
    const int e = element();
    if (e >= batch * n) return;
    const real s = tanh(a[e] + table[(size_t)x[e / n] * n + e % n]);
    h[e] = s;
    if (w) w[e] = real(0.25) * (1 - s * s);
}

extern "C" __global__ void plain_tangent(
    int batch, int n, real* pre, const real* table, const int* x, const real* h, real* dh) {
    const int e = element();
    if (e >= batch * n) return;
    const real value = pre[e] + table[(size_t)x[e / n] * n + e % n];
    pre[e] = value;
    dh[e] = (1 - h[e] * h[e]) * value;
}

extern "C" __global__ void plain_adjoint(
    int batch, int n, real* dh, const real* back, const real* h, real* da, int inject) {
    const int e = element();
    if (e >= batch * n) return;
    const real total = dh[e] + back[e];
    const real own = (1 - h[e] * h[e]) * total;
    dh[e] = total;
    da[e] = inject ? da[e] + own : own;
}

// The intermediate state of multiplicative cells: m = p * q, p = W_mx[x], q = h W_mh ---------------------------

extern "C" __global__ void factor_forward(
    int batch, int n, const real* p_table, const int* x, const real* q, real* m) {
    const int e = element();
    if (e >= batch * n) return;
    m[e] = p_table[(size_t)x[e / n] * n + e % n] * q[e];
}

extern "C" __global__ void factor_tangent(
    int batch, int n, const real* p_table, const real* dp_table, const int* x, const real* q, const real* dq,
    real* dm) {
    const int e = element();
    if (e >= batch * n) return;
    const size_t at = (size_t)x[e / n] * n + e % n;
    dm[e] = dp_table[at] * q[e] + p_table[at] * dq[e];
}

extern "C" __global__ void factor_adjoint(
    int batch, int n, const real* p_table, const int* x, const real* q, const real* dm, real* dp, real* dq) {
    const int e = element();
    if (e >= batch * n) return;
    const real d = dm[e];
    dp[e] = d * q[e];
    dq[e] = d * p_table[(size_t)x[e / n] * n + e % n];
}

// Softmax: one warp a row of V symbols -------------------------------------------------------------------------

template <typename T>
static __device__ __forceinline__ T sum_over_warp(T value) {
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

static __device__ __forceinline__ real most_in_warp(real value) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        const real other = __shfl_xor_sync(ALL_LANES, value, step);
        value = other > value ? other : value;
    }
    return value;
}

extern "C" __global__ void softmax_loss(
    int rows, int symbols, real* logits, const int* targets, double* losses) {
    const int r = element() / WARP, lane = threadIdx.x % WARP;
    if (r >= rows) return;  // a whole warp
    real* row = logits + (size_t)r * symbols;
    const int target = targets[r];
    real top = row[0], chosen = 0;
    for (int v = lane; v < symbols; v += WARP) {
        top = row[v] > top ? row[v] : top;
        if (v == target) chosen = row[v];
    }
    top = most_in_warp(top);
    double total = 0;
    for (int v = lane; v < symbols; v += WARP) {
        row[v] = exp(row[v] - top);
        total += row[v];
    }
    total = sum_over_warp(total);
    const real inverse = real(1 / total);
    for (int v = lane; v < symbols; v += WARP) row[v] *= inverse;
    if (lane == target % WARP) losses[r] = log(total) - double(chosen - top);
}

extern "C" __global__ void softmax_gradient(
    int rows, int symbols, const real* p, const int* targets, real scale, real* out) {
    const int r = element() / WARP, lane = threadIdx.x % WARP;
    if (r >= rows) return;
    const size_t at = (size_t)r * symbols;
    const int target = targets[r];
    for (int v = lane; v < symbols; v += WARP) {
        const real scaled = scale * p[at + v];
        out[at + v] = v == target ? scaled - scale : scaled;
    }
}

extern "C" __global__ void softmax_hessian(int rows, int symbols, const real* p, real* u, real scale) {
    const int r = element() / WARP, lane = threadIdx.x % WARP;
    if (r >= rows) return;
    const size_t at = (size_t)r * symbols;
    real mean = 0;
    for (int v = lane; v < symbols; v += WARP) mean += p[at + v] * u[at + v];
    mean = sum_over_warp(mean);
    for (int v = lane; v < symbols; v += WARP) u[at + v] = scale * p[at + v] * (u[at + v] - mean);
}

// Sums over whole batches --------------------------------------------------------------------------------------

// out[y, v, :] = the sum of those rows of block row y whose symbol is v: the rows y * first, y * first + step, ...,
// `length` of them, as far as there are so many. A block has as many threads as columns; each adds its own
// column, in the order of the rows, in memory of its own.
extern "C" __global__ void segment_sums(
    int count, int width, int symbols, int first, int step, int length, const real* __restrict__ rows,
    long long stride, const int* __restrict__ x, real* __restrict__ out, long long out_stride) {
    extern __shared__ double shared[];
    real* sums = (real*)shared + threadIdx.x;
    const int columns = blockDim.x, j = blockIdx.x * columns + threadIdx.x;
    if (j >= width) return;  // no thread waits for another
    for (int v = 0; v < symbols; v++) sums[v * columns] = 0;
    const int start = blockIdx.y * first, left = (count - start + step - 1) / step;
    const int own = length < left ? length : left;
#pragma unroll 8
    for (int i = 0; i < own; i++) {
        const int r = start + i * step;
        sums[x[r] * columns] += rows[r * stride + j];
    }
    for (int v = 0; v < symbols; v++) out[blockIdx.y * out_stride + v * width + j] = sums[v * columns];
}

extern "C" __global__ void accumulate_squares(
    int batch, int size, const real* __restrict__ each, real* __restrict__ total, real* __restrict__ squares) {
    const int e = element();
    if (e >= size) return;
    real sum = total[e], square = squares[e];
    for (int b = 0; b < batch; b++) {
        const real g = each[(size_t)b * size + e];
        sum += g;
        square += g * g;
    }
    total[e] = sum;
    squares[e] = square;
}
