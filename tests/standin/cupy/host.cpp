// Runs the blocks of a kernel one after the other, or in turn if they are to meet; their threads are fibers.
// Included after the kernels.
#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <vector>

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t SHARED_BYTES = 227 * 1024;  // of a block on Hopper, where it asks for as much

Index threadIdx, blockIdx, blockDim, gridDim;
alignas(16) double shared[SHARED_BYTES / sizeof(double)];

namespace {

constexpr int KEPT = 64;  // meetings of a warp; no thread is further ahead of another one

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};  // touched where it is used
    bool done;
    int meetings, arrivals, waits;
    unsigned long long offered[KEPT];  // by meeting
};

struct Block {
    Index index;
    std::vector<Fiber*> fibers;
    std::vector<char> shared;
    unsigned left, waiting, next, arrived;
    int barriers, place;
    bool started;
};

struct Sent {  // a number that is not yet where it was sent to
    int block;
    size_t at;
    std::vector<char> bytes;
};

struct Cluster {
    unsigned arrived;
    int meetings;
    std::vector<Sent> sent;
};

std::vector<Block*> blocks;
std::vector<Cluster> clusters;
unsigned cluster_blocks;
bool late;  // whether numbers that are sent to other blocks arrive as late as they may, or at once
Block* block;
ucontext_t scheduler;
unsigned current;
bool paused;
void (*body)(void**);
void** arguments;

void run_thread() {
    body(arguments);
    block->fibers[current]->done = true;
    swapcontext(&block->fibers[current]->context, &scheduler);
}

void begin(Block& own, unsigned x, unsigned y, unsigned threads) {
    own.index = {x, y, 0};
    own.left = threads;
    own.waiting = own.barriers = own.next = own.arrived = 0;
    own.started = false;
    while (own.fibers.size() < threads) own.fibers.push_back(new Fiber);
    for (unsigned t = 0; t < threads; t++) {
        Fiber& fiber = *own.fibers[t];
        fiber.done = false;
        fiber.meetings = fiber.arrivals = fiber.waits = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_thread, 0);
    }
}

// Let every thread go on until it waits for another, or one pauses.
void go_on(Block& own) {
    block = &own;
    blockIdx = own.index;
    own.started = true;
    paused = false;
    for (unsigned turn = 0; turn < blockDim.x && !paused; turn++) {
        current = own.next;
        own.next = (current + 1) % blockDim.x;
        if (own.fibers[current]->done) continue;
        threadIdx = {current, 0, 0};
        swapcontext(&scheduler, &own.fibers[current]->context);
        own.left -= own.fibers[current]->done;
    }
}

}  // namespace

void give_way() {
    swapcontext(&block->fibers[current]->context, &scheduler);
}

void pause_block() {
    paused = true;
    give_way();
}

unsigned long long shuffle(unsigned long long bits, int mask) {
    Fiber& own = *block->fibers[current];
    const unsigned other = current ^ mask;
    const int meeting = ++own.meetings;
    own.offered[meeting % KEPT] = bits;
    if (other >= blockDim.x) std::abort();  // a partner that does not exist: undefined on a GPU
    Fiber& partner = *block->fibers[other];
    while (partner.meetings < meeting) {
        if (partner.done) std::abort();  // a partner that has left: it would hang
        give_way();
    }
    if (partner.meetings >= meeting + KEPT) std::abort();
    return partner.offered[meeting % KEPT];
}

void barrier() {
    if (block->left != blockDim.x) std::abort();  // a thread has left: undefined on a GPU
    const int mine = block->barriers;
    if (++block->waiting == blockDim.x) {
        block->waiting = 0;
        block->barriers++;
    } else
        while (block->barriers == mine) give_way();
}

namespace {

Cluster& own_cluster() { return clusters[block->place / cluster_blocks]; }

void deliver(const Sent& sent) {
    Block& target = *blocks[sent.block];
    // Undefined on a GPU: a block that has not started or has ended, or a place outside its memory.
    if (!target.started || !target.left || sent.at + sent.bytes.size() > target.shared.size()) std::abort();
    char* memory = &target == block ? (char*)shared : target.shared.data();
    std::memcpy(memory + sent.at, sent.bytes.data(), sent.bytes.size());
}

}  // namespace

void send_bytes(void* place, int other, const void* value, int bytes) {
    if (other < 0 || other >= (int)cluster_blocks) std::abort();
    const int target = block->place / cluster_blocks * cluster_blocks + other;
    Sent sent{target, size_t((char*)place - (char*)shared), {(const char*)value, (const char*)value + bytes}};
    if (late)
        own_cluster().sent.push_back(std::move(sent));
    else
        deliver(sent);
}

void arrive() {
    Cluster& own = own_cluster();
    Fiber& fiber = *block->fibers[current];
    if (block->left != blockDim.x || fiber.arrivals++ != fiber.waits) std::abort();
    block->arrived++;
    if (++own.arrived < cluster_blocks * blockDim.x) return;
    for (const Sent& sent : own.sent) deliver(sent);
    own.sent.clear();
    own.arrived = 0;
    own.meetings++;
    const int first = block->place / cluster_blocks * cluster_blocks;
    for (unsigned i = 0; i < cluster_blocks; i++) blocks[first + i]->arrived = 0;
}

void wait() {
    Fiber& fiber = *block->fibers[current];
    if (++fiber.waits != fiber.arrivals) std::abort();
    while (own_cluster().meetings < fiber.waits) block->arrived == blockDim.x ? pause_block() : give_way();
}

extern "C" void run_kernel(void (*kernel)(void**), void** values, const unsigned* grid, unsigned threads) {
    body = kernel;
    arguments = values;
    gridDim = {grid[0], grid[1], 1};
    blockDim = {threads, 1, 1};
    if (blocks.empty()) blocks.push_back(new Block);
    for (unsigned y = 0; y < grid[1]; y++)
        for (unsigned x = 0; x < grid[0]; x++) {
            std::memset(shared, 0xff, sizeof shared);  // not a number, as a warning
            begin(*blocks[0], x, y, threads);
            while (blocks[0]->left) go_on(*blocks[0]);
        }
}

// All blocks in turn, each with its own `bytes` of shared memory. A block goes on until one of its threads pauses,
// and another one is next whatever its other threads have done: what is not waited for is not there. The blocks
// are clusters of `cluster` each.
extern "C" void run_together(
    void (*kernel)(void**), void** values, unsigned grid, unsigned threads, unsigned bytes, unsigned cluster,
    bool sent_late) {
    cluster_blocks = cluster;
    late = sent_late;
    clusters.assign(grid / cluster, Cluster());
    body = kernel;
    arguments = values;
    gridDim = {grid, 1, 1};
    blockDim = {threads, 1, 1};
    while (blocks.size() < grid) blocks.push_back(new Block);
    for (unsigned x = 0; x < grid; x++) {
        begin(*blocks[x], x, 0, threads);
        blocks[x]->place = x;
        blocks[x]->shared.assign(bytes, '\xff');
    }
    std::memset(shared, 0xff, sizeof shared);
    unsigned left = grid;
    for (unsigned round = 0; left; round++)
        for (unsigned i = 0; i < grid; i++) {
            Block& own = *blocks[round % 2 ? grid - 1 - i : i];
            if (!own.left) continue;
            std::memcpy(shared, own.shared.data(), bytes);
            do go_on(own);
            while (own.left && !paused);
            std::memcpy(own.shared.data(), shared, bytes);
            left -= !own.left;
        }
    for (const Cluster& own : clusters)
        if (own.arrived || !own.sent.empty()) std::abort();
}
