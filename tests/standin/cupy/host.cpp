// Runs the blocks of a kernel one after the other, their threads as fibers. Included after the kernels.
#include <ucontext.h>

#include <cstdlib>
#include <vector>

Index threadIdx, blockIdx, blockDim, gridDim;
double shared[48 * 1024 / sizeof(double)];

namespace {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    bool done = false;
    int meetings = 0;
    unsigned long long offered[64];  // by meeting; a warp's sum has five
};

std::vector<Fiber*> fibers;
ucontext_t scheduler;
unsigned current;
void (*body)(void**);
void** arguments;

void run_thread() {
    body(arguments);
    fibers[current]->done = true;
    swapcontext(&fibers[current]->context, &scheduler);
}

void give_way() {
    const unsigned me = current;
    swapcontext(&fibers[me]->context, &scheduler);
    current = me;
    threadIdx.x = me;
}

}  // namespace

unsigned long long shuffle(unsigned long long bits, int mask) {
    Fiber& own = *fibers[current];
    const unsigned other = current ^ mask;
    const int meeting = ++own.meetings;
    if (meeting >= 64) std::abort();
    own.offered[meeting] = bits;
    if (other >= blockDim.x) std::abort();  // a partner that does not exist: undefined on a GPU
    while (fibers[other]->meetings < meeting) {
        if (fibers[other]->done) std::abort();  // a partner that has left: it would hang
        give_way();
    }
    return fibers[other]->offered[meeting];
}

extern "C" void run_kernel(void (*kernel)(void**), void** values, const unsigned* grid, unsigned threads) {
    body = kernel;
    arguments = values;
    while (fibers.size() < threads) fibers.push_back(new Fiber);
    gridDim = {grid[0], grid[1], 1};
    blockDim = {threads, 1, 1};
    for (unsigned y = 0; y < grid[1]; y++)
        for (unsigned x = 0; x < grid[0]; x++) {
            blockIdx = {x, y, 0};
            std::memset(shared, 0xff, sizeof shared);  // not a number, as a warning
            for (unsigned t = 0; t < threads; t++) {
                Fiber& fiber = *fibers[t];
                fiber.done = false;
                fiber.meetings = 0;
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = fiber.stack.size();
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, run_thread, 0);
            }
            for (unsigned left = threads; left;) {
                for (unsigned t = 0; t < threads; t++) {
                    if (fibers[t]->done) continue;
                    current = t;
                    threadIdx = {t, 0, 0};
                    swapcontext(&scheduler, &fibers[t]->context);
                    left -= fibers[t]->done;
                }
            }
        }
}
