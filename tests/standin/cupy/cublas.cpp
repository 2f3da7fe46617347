// The few calls of cuBLAS that hfmpi makes, by columns as there, on memory of the host. A hook takes products
// that are only to be captured.
#include <cstddef>

namespace {
int (*hook)(
    int, int, int, int, int, int, int, int, int, double, double, const void*, const void*, void*) = nullptr;

template <typename T>
void product(
    int ta, int tb, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb, T beta, T* c,
    int ldc) {
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) {
            T sum = 0;
            for (int l = 0; l < k; l++) {
                const T x = ta ? a[l + (size_t)i * lda] : a[i + (size_t)l * lda];
                const T y = tb ? b[j + (size_t)l * ldb] : b[l + (size_t)j * ldb];
                sum += x * y;
            }
            T& out = c[i + (size_t)j * ldc];
            out = beta == 0 ? alpha * sum : alpha * sum + beta * out;
        }
}

template <typename T>
int gemm(
    int ta, int tb, int m, int n, int k, const T* alpha, const T* a, int lda, const T* b, int ldb, const T* beta,
    T* c, int ldc) {
    // The checks of cublas<t>gemm: status 7 is CUBLAS_STATUS_INVALID_VALUE.
    if (m < 0 || n < 0 || k < 0 || lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m || lda < 1 || ldb < 1)
        return 7;
    if (hook) return hook(ta, tb, m, n, k, lda, ldb, ldc, sizeof(T), *alpha, *beta, a, b, c);
    product(ta, tb, m, n, k, *alpha, a, lda, b, ldb, *beta, c, ldc);
    return 0;
}
}  // namespace

extern "C" {
int math_mode = -1;
void* stream = nullptr;
size_t workspace_bytes = 0;

void set_hook(decltype(hook) function) { hook = function; }
int cublasCreate_v2(void** handle) { *handle = &math_mode; return 0; }
int cublasSetStream_v2(void*, void* s) { stream = s; return 0; }
int cublasSetWorkspace_v2(void*, void*, size_t bytes) { workspace_bytes = bytes; return 0; }
int cublasSetMathMode(void*, int mode) { math_mode = mode; return 0; }
int cublasSgemm_v2(
    void*, int ta, int tb, int m, int n, int k, const float* alpha, const float* a, int lda, const float* b,
    int ldb, const float* beta, float* c, int ldc) {
    return gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
int cublasDgemm_v2(
    void*, int ta, int tb, int m, int n, int k, const double* alpha, const double* a, int lda, const double* b,
    int ldb, const double* beta, double* c, int ldc) {
    return gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}
