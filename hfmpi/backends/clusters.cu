// Loops over all steps of a gated cell by thread-block clusters, for compute capability 9.0 and later. Compiled after
// kernels.cu, with -DCLUSTER=... (blocks of a cluster) and -DTHREADS_CLUSTER=... (threads of a block).
//
// The sequences of a batch do not depend on one another: each cluster runs the loop for `per` of them and never waits
// for another cluster. Each block of a cluster computes at most `most` of the n units, and stores their part of the
// matrices in shared memory. The blocks exchange numbers by writing to one another's shared memory, and wait for one
// another once per product. Each thread has at most one unit of one sequence, the same in all steps, so that the
// state of this unit stays in a register, and its inputs of the next step are loaded while the thread waits.
//
// Shared arrays have the sequences of a cluster as their last axis, in groups of `width` (1, or 4 that a thread
// multiplies at once). A group may have fewer sequences; the numbers in their place are not defined and not used.

#define LANES 16  // threads that share the sums of one unit and one group of sequences

#ifdef __CUDACC__  // the host build of the tests defines these three

// Signal that this thread has made its writes; all threads of the cluster do so.
static __device__ __forceinline__ void arrive() {
    __syncwarp();  // `aligned` means that a warp executes the instruction as one
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Wait until all threads of the cluster have arrived.
static __device__ __forceinline__ void wait() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Write a number to the shared memory of a block of the cluster, where `place` is in the memory of this block.
static __device__ __forceinline__ void send(real* place, int block, real value) {
    unsigned address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"((unsigned)__cvta_generic_to_shared(place)), "r"(block));
    if (sizeof(real) == 4)
        asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(__float_as_int(value)) : "memory");
    else
        asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(address), "l"(__double_as_longlong(value)) : "memory");
}

#endif

template <int N> struct __align__(N == 1 ? sizeof(real) : 16) Several {  // numbers that are loaded together
    real v[N];
};

struct Part {  // the units of this block and the sequences of its cluster; the unit and sequence of this thread
    int n, most, rank, first, own, start, count, width, groups;
    int item, b, j, place;  // number among the block's; sequence of the batch; unit; offset in rows (groups, n, width)
    bool mine;              // whether the thread has one
};

static __device__ __forceinline__ Part part(int batch, int n, int most, int per) {
    Part p;
    p.n = n;
    p.most = most;
    p.rank = blockIdx.x % CLUSTER;
    p.first = p.rank * most;
    p.own = n - p.first < most ? n - p.first : most;
    if (p.own < 0) p.own = 0;
    p.start = blockIdx.x / CLUSTER * per;
    p.count = batch - p.start < per ? batch - p.start : per;
    p.width = per == 1 ? 1 : 4;
    p.groups = (p.count + p.width - 1) / p.width;
    p.item = threadIdx.x;
    const int units = p.own ? p.own : 1, s = p.item % p.width, unit = p.item / p.width % units;
    const int group = p.item / p.width / units;
    p.b = p.start + group * p.width + s;
    p.j = p.first + unit;
    p.place = (group * n + p.j) * p.width + s;
    p.mine = p.own && group * p.width + s < p.count;
    return p;
}

// Write a number to the same place in all blocks of the cluster. Each block starts with a different one.
static __device__ __forceinline__ void send_to_all(const Part& p, real* place, real value) {
#pragma unroll
    for (int i = 0; i < CLUSTER; i++) send(place, (p.rank + i) % CLUSTER, value);
}

// Add up `sums` over the LANES threads of an item. Each thread keeps one sum, whose number is returned.
template <int COUNT>
static __device__ __forceinline__ int reduce(real* sums, int step, int lane) {
    if constexpr (COUNT == 1) {
        for (; step > 0; step /= 2) sums[0] += __shfl_xor_sync(ALL_LANES, sums[0], step);
        return 0;
    } else {
        constexpr int HALF = COUNT / 2;
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const real kept = upper ? sums[i + HALF] : sums[i], sent = upper ? sums[i] : sums[i + HALF];
            sums[i] = kept + __shfl_xor_sync(ALL_LANES, sent, step);
        }
        return upper * HALF + reduce<HALF>(sums, step / 2, lane);
    }
}

// Products with the columns of this block: all of `rows`, (groups, n, WIDTH), are needed.
//
// columns (n, most | 1, GROUPS); sums (items, GROUPS), where the items of a group of sequences are (own, WIDTH). An odd
// number of units between the rows of `columns` prevents bank conflicts.
template <int GROUPS, int WIDTH>
static __device__ __forceinline__ void gather(const Part& p, const real* rows, const real* columns, real* sums) {
    constexpr int COUNT = GROUPS * WIDTH;
    const int lane = threadIdx.x % LANES, at_once = blockDim.x / LANES, items = p.groups * p.own;
    for (int base = 0; base < items; base += at_once) {  // whole warps: the sums are shuffled
        const int item = base + threadIdx.x / LANES;
        real total[COUNT];
        for (int i = 0; i < COUNT; i++) total[i] = 0;
        if (item < items) {
            const Several<WIDTH>* row = (const Several<WIDTH>*)rows + item / p.own * p.n;
            const Several<GROUPS>* column = (const Several<GROUPS>*)columns + item % p.own;
#pragma unroll 4
            for (int k = lane; k < p.n; k += LANES) {
                const Several<WIDTH> a = row[k];
                const Several<GROUPS> b = column[k * (p.most | 1)];
                for (int s = 0; s < WIDTH; s++)
                    for (int g = 0; g < GROUPS; g++) total[s * GROUPS + g] += a.v[s] * b.v[g];
            }
        }
        const int kept = reduce<COUNT>(total, LANES / 2, lane);
        if (item < items && lane % (LANES / COUNT) == 0) sums[item * COUNT + kept] = total[0];
    }
    __syncthreads();
}

template <int GROUPS>
static __device__ __forceinline__ void multiply_rows(
    const Part& p, const real* rows, const real* columns, real* sums) {
    if (p.width == 1)
        gather<GROUPS, 1>(p, rows, columns, sums);
    else
        gather<GROUPS, 4>(p, rows, columns, sums);
}

// Products with the rows of this block, (length, n), of the cotangents of its units, (groups, length, WIDTH). They are
// parts of sums over all blocks, and each is sent to the block whose unit the sum is for: parts (CLUSTER, groups,
// WIDTH, most).
template <int WIDTH>
static __device__ __forceinline__ void scatter(
    const Part& p, const real* cotangents, int length, const real* rows, real* parts) {
    for (int i = threadIdx.x; i < p.groups * p.n; i += blockDim.x) {
        const int group = i / p.n, j = i % p.n;
        const Several<WIDTH>* a = (const Several<WIDTH>*)cotangents + group * length;
        real total[WIDTH];
        for (int s = 0; s < WIDTH; s++) total[s] = 0;
#pragma unroll 4
        for (int k = 0; k < length; k++) {
            const Several<WIDTH> each = a[k];
            const real row = rows[k * p.n + j];
            for (int s = 0; s < WIDTH; s++) total[s] += each.v[s] * row;
        }
        real* place = parts + (p.rank * p.groups + group) * WIDTH * p.most + j % p.most;
        for (int s = 0; s < WIDTH; s++) send(place + s * p.most, j / p.most, total[s]);
    }
}

static __device__ __forceinline__ void multiply_cotangents(
    const Part& p, const real* cotangents, int length, const real* rows, real* parts) {
    if (p.width == 1)
        scatter<1>(p, cotangents, length, rows, parts);
    else
        scatter<4>(p, cotangents, length, rows, parts);
}

// Return the sum for the unit and sequence of this thread, always in the same order.
static __device__ __forceinline__ real add_parts(const Part& p, const real* parts) {
    parts += (p.b - p.start) * p.most + p.j - p.first;
    real sum = 0;
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) sum += parts[r * p.groups * p.width * p.most];
    return sum;
}

// columns[k, j, g] = matrix[k, g * n + first + j], of a matrix (n, groups * n).
static __device__ void load_columns(const Part& p, const real* matrix, int groups, real* columns) {
    for (int i = threadIdx.x; i < p.n * p.own * groups; i += blockDim.x) {
        const int j = i % p.own, g = i / p.own % groups, k = i / p.own / groups;
        columns[(k * (p.most | 1) + j) * groups + g] = matrix[((size_t)k * groups + g) * p.n + p.first + j];
    }
}

// rows[(j, g), k] = matrix[g * n + first + j, k], of a matrix (groups * n, n).
static __device__ void load_rows(const Part& p, const real* matrix, int groups, real* rows) {
    for (int i = threadIdx.x; i < p.own * groups * p.n; i += blockDim.x) {
        const int k = i % p.n, g = i / p.n % groups, j = i / p.n / groups;
        rows[i] = matrix[((size_t)g * p.n + p.first + j) * p.n + k];
    }
}

// rows (groups, n, width) of the sequences of the cluster, from an array (B, n).
static __device__ void load_states(const Part& p, const real* states, real* rows) {
    for (int i = threadIdx.x; i < p.count * p.n; i += blockDim.x) {
        const int b = i / p.n, k = i % p.n;
        rows[(b / p.width * p.n + k) * p.width + b % p.width] = states[(size_t)(p.start + b) * p.n + k];
    }
}

static __device__ __forceinline__ int round_up(int size) { return (size + 3) / 4 * 4; }

struct Memory {  // shared memory of the loops forward in time
    real *rows, *other, *sums, *columns, *factor_columns;
};

static __device__ __forceinline__ Memory memory(const Part& p, int per) {
    const int sequences = (per + p.width - 1) / p.width * p.width;
    Memory m;
    m.rows = (real*)shared;
    m.other = m.rows + round_up(sequences * p.n);
    m.sums = m.other + round_up(sequences * p.n);
    m.columns = m.sums + 4 * sequences * p.most;
    m.factor_columns = m.columns + 4 * p.n * (p.most | 1);
    return m;
}

struct ForwardInputs {
    Gates row;
    real p;
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS_CLUSTER, 1) cluster_forward(
    int steps, int batch, int n, int most, int per, int kept, const real* recurrent, const real* factor,
    const real* p_table, const real* table, const int* x, const real* bias_h, real* c, real* hidden, real* k,
    real* w, real* q, real* m) {
    const Part p = part(batch, n, most, per);
    Memory s = memory(p, per);
    const size_t step = (size_t)batch * n;
    const int e = p.b * n + p.j;
    load_columns(p, recurrent, 4, s.columns);
    if (factor) load_columns(p, factor, 1, s.factor_columns);
    load_states(p, hidden, s.rows);
    real state = p.mine ? c[e] : 0;
    const auto inputs = [&](int t) -> ForwardInputs {
        if (!p.mine || t == steps) return {};
        const size_t symbol = x[t * batch + p.b];
        return {gates(table + symbol * 4 * n + p.j, n), factor ? p_table[symbol * n + p.j] : 0};
    };
    ForwardInputs in = inputs(0);
    arrive();  // also: every block has started, and can be written to
    wait();
    for (int t = 0; t < steps; t++) {
        const real* source = s.rows;
        real* target = s.other;
        if (factor) {
            multiply_rows<1>(p, s.rows, s.factor_columns, s.sums);
            if (p.mine) {
                const real own = s.sums[p.item], intermediate = in.p * own;
                q[t % kept * step + e] = own;
                m[t % kept * step + e] = intermediate;
                send_to_all(p, s.other + p.place, intermediate);
            }
            arrive();
            wait();
            source = s.other;
            target = s.rows;
        }
        multiply_rows<4>(p, source, s.columns, s.sums);
        if (p.mine) {
            const Gates a = gates(s.sums + p.item * 4, 1) + in.row;
            const real h = forward_unit(
                batch, n, p.b, p.j, a, bias_h, state, hidden + (t + 1) * step, k ? k + t * 6 * step : k,
                w ? w + t * 4 * step : w);
            send_to_all(p, target + p.place, h);
        }
        arrive();
        in = inputs(t + 1);
        wait();
        s.other = factor ? s.other : s.rows;
        s.rows = target;
    }
    if (p.mine) c[e] = state;
}

struct TangentInputs {
    Gates a;
    Coefficients k;
    real dh, dq, p, dp, q;
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS_CLUSTER, 1) cluster_tangent(
    int steps, int batch, int n, int most, int per, const real* recurrent, const real* factor, const real* p_table,
    const real* dp_table, const real* table, const int* x, const real* k, const real* q, real* pre, real* dq,
    real* dh, real* dc, int add) {
    const Part p = part(batch, n, most, per);
    Memory s = memory(p, per);
    const size_t step = (size_t)batch * n;
    const int e = p.b * n + p.j;
    load_columns(p, recurrent, 4, s.columns);
    if (factor) load_columns(p, factor, 1, s.factor_columns);
    load_states(p, dh, s.rows);
    real state = p.mine ? dc[e] : 0;
    real* own = pre + (size_t)p.b * 4 * n + p.j;
    const auto inputs = [&](int t) -> TangentInputs {
        if (!p.mine || t == steps) return {};
        const size_t symbol = x[t * batch + p.b], at = symbol * n + p.j;
        TangentInputs in;
        in.a = gates(own + t * 4 * step, n) + gates(table + symbol * 4 * n + p.j, n);
        in.k = coefficients(k + t * 6 * step + e, step);
        in.dh = add ? dh[(t + 1) * step + e] : 0;
        in.dq = factor ? dq[t * step + e] : 0;
        in.p = factor ? p_table[at] : 0;
        in.dp = factor ? dp_table[at] : 0;
        in.q = factor ? q[t * step + e] : 0;
        return in;
    };
    TangentInputs in = inputs(0);
    arrive();
    wait();
    for (int t = 0; t < steps; t++) {
        const real* source = s.rows;
        real* target = s.other;
        if (factor) {
            multiply_rows<1>(p, s.rows, s.factor_columns, s.sums);
            if (p.mine) {
                const real total = in.dq + s.sums[p.item];
                dq[t * step + e] = total;
                send_to_all(p, s.other + p.place, in.dp * in.q + in.p * total);
            }
            arrive();
            wait();
            source = s.other;
            target = s.rows;
        }
        multiply_rows<4>(p, source, s.columns, s.sums);
        if (p.mine) {
            const Gates a = gates(s.sums + p.item * 4, 1) + in.a;
            store(a, own + t * 4 * step, n);
            const real tangent = tangent_unit(a, in.k, state, in.dh);
            dh[(t + 1) * step + e] = tangent;
            send_to_all(p, target + p.place, tangent);
        }
        arrive();
        in = inputs(t + 1);
        wait();
        s.other = factor ? s.other : s.rows;
        s.rows = target;
    }
    if (p.mine) dc[e] = state;
}

struct AdjointInputs {
    Gates da;
    Coefficients k;
    real dh, p, q;
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS_CLUSTER, 1) cluster_adjoint(
    int steps, int batch, int n, int most, int per, const real* recurrent_t, const real* factor_t,
    const real* p_table, const int* x, const real* k, const real* q, real* dh, real* da, real* dp, real* dq,
    real* back, real* dc, int inject) {
    const Part p = part(batch, n, most, per);
    const int sequences = (per + p.width - 1) / p.width * p.width, size = round_up(CLUSTER * sequences * most);
    real *parts = (real*)shared, *other = parts + size, *cotangents = other + size;
    real *rows = cotangents + 4 * sequences * most, *factor_rows = rows + 4 * most * n;
    const size_t step = (size_t)batch * n;
    const int e = p.b * n + p.j, group = (p.b - p.start) / p.width, s = p.item % p.width, unit = p.j - p.first;
    load_rows(p, recurrent_t, 4, rows);
    if (factor_t) load_rows(p, factor_t, 1, factor_rows);
    real state = p.mine ? dc[e] : 0, following = p.mine ? back[e] : 0;
    const auto inputs = [&](int t) -> AdjointInputs {
        if (!p.mine || t < 0) return {};
        AdjointInputs in;
        in.da = inject ? gates(da + t * 4 * step + (size_t)p.b * 4 * n + p.j, n) : Gates{};
        in.k = coefficients(k + t * 6 * step + e, step);
        in.dh = dh[(t + 1) * step + e];
        in.p = factor_t ? p_table[(size_t)x[t * batch + p.b] * n + p.j] : 0;
        in.q = factor_t ? q[t * step + e] : 0;
        return in;
    };
    AdjointInputs in = inputs(steps - 1);
    arrive();
    wait();
    for (int t = steps - 1; t >= 0; t--) {
        if (p.mine) {
            const real total = in.dh + following;
            dh[(t + 1) * step + e] = total;
            const Gates own = in.da + adjoint_unit(total, in.k, state);
            store(own, da + t * 4 * step + (size_t)p.b * 4 * n + p.j, n);
            store(own, cotangents + (group * p.own + unit) * 4 * p.width + s, p.width);
        }
        __syncthreads();
        multiply_cotangents(p, cotangents, 4 * p.own, rows, parts);
        arrive();
        const AdjointInputs next = inputs(t - 1);
        wait();
        if (p.mine) following = add_parts(p, parts);
        if (factor_t) {
            if (p.mine) {
                dp[t * step + e] = following * in.q;
                const real own = following * in.p;
                dq[t * step + e] = own;
                cotangents[(group * p.own + unit) * p.width + s] = own;
            }
            __syncthreads();
            multiply_cotangents(p, cotangents, p.own, factor_rows, other);
            arrive();
            wait();
            if (p.mine) following = add_parts(p, other);
        } else {
            real* used = parts;
            parts = other;
            other = used;
        }
        in = next;
    }
    if (p.mine) {
        back[e] = following;
        dc[e] = state;
    }
}
