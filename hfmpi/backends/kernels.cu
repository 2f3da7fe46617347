// The fused kernels for NVIDIA GPUs. The formulas, and the meaning of every array, are those of numpy.py and
// base.py. `real` is float or double (-DREAL=...). All arrays are C-contiguous; a null pointer represents an
// array that is not needed.
//
// Step kernels have one thread per element (b, j) of B sequences and n units. Tangents and adjoints of C columns
// have one thread per element (r, j) of B C rows and n units, where r / C is the sequence. Sums do not use atomics,
// so that the order of additions is fixed and results are reproducible bit for bit.

typedef REAL real;

#define WARP 32
#define ALL_LANES 0xffffffffu

extern __shared__ __align__(16) double shared[];

static __device__ __forceinline__ real sigmoid(real a) {
    return real(0.5) * tanh(real(0.5) * a) + real(0.5);
}

static __device__ __forceinline__ int element() { return blockIdx.x * blockDim.x + threadIdx.x; }

// Gated cells: pre-activations in the order i, f, o, u; coefficients k = f, k_i, k_f, k_o, k_u, k_c -----------

static __device__ __forceinline__ void forward_unit(
    int batch, int n, int b, int j, const real* pre, const real* table, const int* x, const real* bias_h, real* c,
    real* h, real* k, real* w) {
    const int e = b * n + j;
    const real* row = table + (size_t)x[b] * 4 * n;
    const real i = sigmoid(pre[0] + row[j]);
    const real f = sigmoid(pre[1] + row[n + j]);
    const real o = sigmoid(pre[2] + row[2 * n + j]);
    const real a_u = pre[3] + row[3 * n + j];
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

static __device__ __forceinline__ void tangent_unit(
    int batch, int n, int columns, int r, int j, const real* a, real* pre, const real* table, const int* x,
    const real* k, real* dc, real* dh, int add) {
    const int e = r * n + j, b = r / columns;
    const size_t next = (size_t)batch * n;
    real* own = pre + (size_t)r * 4 * n;
    const real* row = table + ((size_t)x[b] * columns + r % columns) * 4 * n;
    k += b * n + j;
    const real ri = a[0] + row[j];
    const real rf = a[1] + row[n + j];
    const real ro = a[2] + row[2 * n + j];
    const real ru = a[3] + row[3 * n + j];
    own[j] = ri;
    own[n + j] = rf;
    own[2 * n + j] = ro;
    own[3 * n + j] = ru;
    const real rc = k[0] * dc[e] + k[next] * ri + k[2 * next] * rf + k[4 * next] * ru;
    const real rh = k[3 * next] * ro + k[5 * next] * rc;
    dc[e] = rc;
    dh[e] = add ? dh[e] + rh : rh;
}

static __device__ __forceinline__ void adjoint_unit(
    int batch, int n, int columns, int r, int j, real* dh, const real* back, const real* k, real* dc, real* da,
    int inject) {
    const int e = r * n + j;
    const size_t next = (size_t)batch * n;
    real* own = da + (size_t)r * 4 * n;
    k += r / columns * n + j;
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

extern "C" __global__ void gated_forward(
    int batch, int n, const real* a, const real* table, const int* x, const real* bias_h, real* c, real* h,
    real* k, real* w) {
    const int e = element();
    if (e >= batch * n) return;
    const int b = e / n, j = e % n;
    const real* own = a + (size_t)b * 4 * n + j;
    const real pre[4] = {own[0], own[n], own[2 * n], own[3 * n]};
    forward_unit(batch, n, b, j, pre, table, x, bias_h, c, h, k, w);
}

extern "C" __global__ void gated_tangent(
    int rows, int n, int columns, real* pre, const real* table, const int* x, const real* k, real* dc, real* dh,
    int add) {
    const int e = element();
    if (e >= rows * n) return;
    const int r = e / n, j = e % n;
    const real* own = pre + (size_t)r * 4 * n + j;
    const real a[4] = {own[0], own[n], own[2 * n], own[3 * n]};
    tangent_unit(rows / columns, n, columns, r, j, a, pre, table, x, k, dc, dh, add);
}

extern "C" __global__ void gated_adjoint(
    int rows, int n, int columns, real* dh, const real* back, const real* k, real* dc, real* da, int inject) {
    const int e = element();
    if (e < rows * n) adjoint_unit(rows / columns, n, columns, e / n, e % n, dh, back, k, dc, da, inject);
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
    int rows, int n, int columns, real* pre, const real* table, const int* x, const real* h, real* dh) {
    const int e = element();
    if (e >= rows * n) return;
    const int r = e / n, j = e % n, b = r / columns;
    const real value = pre[e] + table[((size_t)x[b] * columns + r % columns) * n + j], own = h[b * n + j];
    pre[e] = value;
    dh[e] = (1 - own * own) * value;
}

extern "C" __global__ void plain_adjoint(
    int rows, int n, int columns, real* dh, const real* back, const real* h, real* da, int inject) {
    const int e = element();
    if (e >= rows * n) return;
    const real total = dh[e] + back[e], state = h[e / n / columns * n + e % n];
    const real own = (1 - state * state) * total;
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
    int rows, int n, int columns, const real* p_table, const real* dp_table, const int* x, const real* q,
    const real* dq, real* dm) {
    const int e = element();
    if (e >= rows * n) return;
    const int r = e / n, j = e % n, b = r / columns;
    const real dp = dp_table[((size_t)x[b] * columns + r % columns) * n + j];
    dm[e] = dp * q[b * n + j] + p_table[(size_t)x[b] * n + j] * dq[e];
}

extern "C" __global__ void factor_adjoint(
    int rows, int n, int columns, const real* p_table, const int* x, const real* q, const real* dm, real* dp,
    real* dq) {
    const int e = element();
    if (e >= rows * n) return;
    const int j = e % n, b = e / n / columns;
    const real d = dm[e];
    dp[e] = d * q[b * n + j];
    dq[e] = d * p_table[(size_t)x[b] * n + j];
}

// Softmax: one warp per row of V symbols -----------------------------------------------------------------------

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
    if (r >= rows) return;  // all threads of a warp return together
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

extern "C" __global__ void softmax_hessian(
    int rows, int symbols, int columns, const real* p, real* u, real scale) {
    const int r = element() / WARP, lane = threadIdx.x % WARP;
    if (r >= rows) return;
    const size_t at = (size_t)r * symbols;
    real mean = 0;
    p += (size_t)(r / columns) * symbols;
    for (int v = lane; v < symbols; v += WARP) mean += p[v] * u[at + v];
    mean = sum_over_warp(mean);
    for (int v = lane; v < symbols; v += WARP) u[at + v] = scale * p[v] * (u[at + v] - mean);
}

// Sums over whole batches --------------------------------------------------------------------------------------

// out[y, v, :] = the sum of the rows of part y whose symbol is v. Part y consists of the rows y * first,
// y * first + step, ..., at most `length` of them. A block has one thread per column; each thread adds its column
// in the order of the rows, in a separate part of the shared memory.
extern "C" __global__ void segment_sums(
    int count, int width, int symbols, int first, int step, int length, const real* __restrict__ rows,
    long long stride, const int* __restrict__ x, real* __restrict__ out, long long out_stride) {
    real* sums = (real*)shared + threadIdx.x;
    const int columns = blockDim.x, j = blockIdx.x * columns + threadIdx.x;
    if (j >= width) return;  // allowed, because the threads do not synchronise
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

// Loops over all steps of a gated cell in one launch -----------------------------------------------------------
//
// Every block computes at most `most` of the n units and stores their columns of the matrices in shared memory. All
// blocks are on the GPU at once (a cooperative launch). Each block computes a part of every product, and all blocks
// wait for one another after it. Results of other blocks are read from the second-level cache, because each
// multiprocessor has a separate first-level cache.

#define THREADS_PERSISTENT 512
#define SPLIT 8  // threads that share the sums of one unit and sequence
#ifndef PAUSE
#define PAUSE()
#endif

template <typename T> struct Wide;  // 16 bytes, the maximum that a thread loads at once
template <> struct Wide<float> { typedef float4 type; };
template <> struct Wide<double> { typedef double2 type; };

struct Share {  // the units of this block, and its memory
    int batch, n, tile, first, own;
    int* arrived;
    int expected;
    real *rows, *columns, *factor_columns;
};

static __device__ __forceinline__ Share share(int batch, int n, int most, int tile, int length, int* arrived) {
    const int first = blockIdx.x * most, left = n - first;
    real *rows = (real*)shared, *columns = rows + (tile * length + 3) / 4 * 4;
    return {batch, n, tile, first, left < most ? left : most, arrived, 0, rows, columns, columns + 4 * n * most};
}

// Wait for all blocks, so that their results are visible.
static __device__ void meet(Share& s) {
    __syncthreads();
    if (threadIdx.x == 0) {
        s.expected += gridDim.x;
        __threadfence();
        atomicAdd(s.arrived, 1);
        while (*(volatile int*)s.arrived < s.expected) PAUSE();
        __threadfence();
    }
    __syncthreads();
}

// Set columns[k, j, g] = matrix[k, g * n + first + j] of a matrix (length, groups * n). The caller synchronises.
static __device__ void keep(const Share& s, const real* matrix, int length, int groups, real* columns) {
    const int width = s.own * groups;
    for (int i = threadIdx.x; i < length * width; i += blockDim.x) {
        const int k = i / width, j = i % width / groups, g = i % groups;
        columns[i] = matrix[(size_t)k * groups * s.n + g * s.n + s.first + j];
    }
}

// Copy to shared memory an array that other blocks may have written.
static __device__ __forceinline__ void stage(const real* source, int size, real* rows) {
    typedef Wide<real>::type Many;
    const int width = sizeof(Many) / sizeof(real), wide = (size_t)source % sizeof(Many) ? 0 : size / width;
#pragma unroll 4
    for (int i = threadIdx.x; i < wide; i += blockDim.x) ((Many*)rows)[i] = __ldcg((const Many*)source + i);
#pragma unroll 4
    for (int i = wide * width + threadIdx.x; i < size; i += blockDim.x) rows[i] = __ldcg(source + i);
    __syncthreads();
}

// Call then(b, j, sums) for every sequence and unit of the block, with
// sums[g] = sum over k of source[b, k] * columns[k, j, g].
template <int GROUPS, typename Then>
static __device__ __forceinline__ void multiply(
    const Share& s, const real* source, int length, const real* columns, Then then) {
    const int lane = threadIdx.x % SPLIT, at_once = blockDim.x / SPLIT;
    for (int start = 0; start < s.batch; start += s.tile) {
        const int count = s.batch - start < s.tile ? s.batch - start : s.tile;
        stage(source + (size_t)start * length, count * length, s.rows);
        for (int base = 0; base < count * s.own; base += at_once) {  // in complete warps, whose lanes share sums
            const int item = base + threadIdx.x / SPLIT;
            const bool valid = item < count * s.own;
            const int b = item / s.own, j = item % s.own;
            real sums[GROUPS];
            for (int g = 0; g < GROUPS; g++) sums[g] = 0;
            if (valid) {
                const real* row = s.rows + b * length;
#pragma unroll 4
                for (int k = lane; k < length; k += SPLIT) {
                    const real* column = columns + (k * s.own + j) * GROUPS;
                    if (GROUPS == 4) column = (const real*)__builtin_assume_aligned(column, 16);
                    for (int g = 0; g < GROUPS; g++) sums[g] += row[k] * column[g];
                }
            }
            for (int g = 0; g < GROUPS; g++)
                for (int step = SPLIT / 2; step > 0; step /= 2)
                    sums[g] += __shfl_xor_sync(ALL_LANES, sums[g], step);
            if (valid && lane == 0) then(start + b, s.first + j, sums);
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS_PERSISTENT) persistent_forward(
    int steps, int batch, int n, int most, int tile, int kept, const real* recurrent, const real* factor,
    const real* p_table, const real* table, const int* x, const real* bias_h, real* c, real* hidden, real* k,
    real* w, real* q, real* m, int* arrived) {
    Share s = share(batch, n, most, tile, n, arrived);
    keep(s, recurrent, n, 4, s.columns);
    if (factor) keep(s, factor, n, 1, s.factor_columns);
    const size_t step = (size_t)batch * n;
    for (int t = 0; t < steps; t++, x += batch, hidden += step) {
        const real* source = hidden;
        if (factor) {
            real *q_t = q + t % kept * step, *m_t = m + t % kept * step;
            multiply<1>(s, hidden, n, s.factor_columns, [&](int b, int j, const real* sums) {
                q_t[b * n + j] = sums[0];
                m_t[b * n + j] = p_table[(size_t)x[b] * n + j] * sums[0];
            });
            meet(s);
            source = m_t;
        }
        multiply<4>(s, source, n, s.columns, [&](int b, int j, const real* sums) {
            forward_unit(
                batch, n, b, j, sums, table, x, bias_h, c, hidden + step, k ? k + t * 6 * step : k,
                w ? w + t * 4 * step : w);
        });
        meet(s);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS_PERSISTENT) persistent_tangent(
    int steps, int batch, int n, int most, int tile, const real* recurrent, const real* factor,
    const real* p_table, const real* dp_table, const real* table, const int* x, const real* k, const real* q,
    real* pre, real* dq, real* dm, real* dh, real* dc, int add, int* arrived) {
    Share s = share(batch, n, most, tile, n, arrived);
    keep(s, recurrent, n, 4, s.columns);
    if (factor) keep(s, factor, n, 1, s.factor_columns);
    const size_t step = (size_t)batch * n;
    for (int t = 0; t < steps; t++, x += batch, dh += step, pre += 4 * step, k += 6 * step) {
        const real* source = dh;
        if (factor) {
            multiply<1>(s, dh, n, s.factor_columns, [&](int b, int j, const real* sums) {
                const int e = b * n + j;
                const size_t at = (size_t)x[b] * n + j;
                const real own = dq[t * step + e] + sums[0];
                dq[t * step + e] = own;
                dm[e] = dp_table[at] * q[t * step + e] + p_table[at] * own;
            });
            meet(s);
            source = dm;
        }
        multiply<4>(s, source, n, s.columns, [&](int b, int j, const real* sums) {
            const real* own = pre + (size_t)b * 4 * n + j;
            const real a[4] = {
                own[0] + sums[0], own[n] + sums[1], own[2 * n] + sums[2], own[3 * n] + sums[3]};
            tangent_unit(batch, n, 1, b, j, a, pre, table, x, k, dc, dh + step, add);
        });
        meet(s);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS_PERSISTENT) persistent_adjoint(
    int steps, int batch, int n, int most, int tile, const real* recurrent_t, const real* factor_t,
    const real* p_table, const int* x, const real* k, const real* q, real* dh, real* da, real* dp, real* dq,
    real* back, real* dc, int inject, int* arrived) {
    Share s = share(batch, n, most, tile, 4 * n, arrived);
    keep(s, recurrent_t, 4 * n, 1, s.columns);
    if (factor_t) keep(s, factor_t, n, 1, s.factor_columns);
    const size_t step = (size_t)batch * n;
    for (int t = steps - 1; t >= 0; t--) {
        real *da_t = da + t * 4 * step, *dq_t = factor_t ? dq + t * step : dq;
        for (int i = threadIdx.x; i < batch * s.own; i += blockDim.x)
            adjoint_unit(
                batch, n, 1, i / s.own, s.first + i % s.own, dh + (t + 1) * step, back, k + t * 6 * step, dc, da_t,
                inject);
        meet(s);
        multiply<1>(s, da_t, 4 * n, s.columns, [&](int b, int j, const real* sums) {
            const int e = b * n + j;
            if (!factor_t) {
                back[e] = sums[0];
                return;
            }
            dp[t * step + e] = sums[0] * q[t * step + e];
            dq_t[e] = sums[0] * p_table[(size_t)x[t * batch + b] * n + j];
        });
        if (!factor_t) continue;
        meet(s);
        multiply<1>(s, dq_t, n, s.factor_columns, [&](int b, int j, const real* sums) { back[b * n + j] = sums[0]; });
    }
}
