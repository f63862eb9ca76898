// The threads of a block, each a fiber of one host thread: they take turns, and give them up where they wait for each
// other.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "fibers.hpp"
#include "hopper.hpp"
#include "internal.hpp"

#ifdef MLKIT_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)

// Keeps what a call leaves as it was, on the stack; goes on where the other stack left off.
asm(R"(
.text
.globl mlkit_cuda_emulation_switch
.type mlkit_cuda_emulation_switch, @function
mlkit_cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mlkit_cuda_emulation_switch, .-mlkit_cuda_emulation_switch
.section .note.GNU-stack, "", @progbits
.text
)");

static void* first_stack_pointer(std::uintptr_t top, void (*entry)()) {
  auto* p = reinterpret_cast<void**>(top);
  *--p = nullptr;  // where entry would return to
  *--p = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  return p;
}

#elif defined(__aarch64__)

asm(R"(
.text
.globl mlkit_cuda_emulation_switch
.type mlkit_cuda_emulation_switch, %function
mlkit_cuda_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size mlkit_cuda_emulation_switch, .-mlkit_cuda_emulation_switch
.section .note.GNU-stack, "", %progbits
.text
)");

static void* first_stack_pointer(std::uintptr_t top, void (*entry)()) {
  auto* p = reinterpret_cast<void**>(top - 160);
  std::memset(p, 0, 160);
  p[11] = reinterpret_cast<void*>(entry);  // x30
  return p;
}

#else
#error "the emulation of CUDA knows how to switch stacks on x86-64 and AArch64"
#endif

extern "C" void mlkit_cuda_emulation_switch(void** save, void* load);

thread_local constinit uint3 gridDim{}, blockDim{};

namespace cuda_emulation {

thread_local constinit engine now;

namespace {

turns turn_order = [] {
  const char* text = std::getenv("MLKIT_EMULATED_TURNS");
  return text && std::strcmp(text, "backward") == 0 ? turns::backward : turns::forward;
}();

// Stacks of one host thread, below each of them a page that must not be touched.
struct stacks {
  static constexpr std::size_t guard = 4096;
  std::vector<std::uintptr_t> all;  // lowest addresses

  std::uintptr_t operator[](std::size_t i) {
    while (all.size() <= i) {
      void* p = mmap(nullptr, stack_bytes + guard, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      mprotect(p, guard, PROT_NONE);
      all.push_back(reinterpret_cast<std::uintptr_t>(p) + guard);
    }
    return all[i];
  }
  ~stacks() {
    for (const auto p : all) munmap(reinterpret_cast<void*>(p - guard), stack_bytes + guard);
  }
};
// Of a block that waits while others of its cluster have their turn.
struct kept_block {
  block_state state;
  std::shared_ptr<void> hopper;
};
struct owned {
  stacks of_fibers;
  std::vector<fiber> fibers;  // of all blocks of a cluster, one after another
  std::vector<kept_block> blocks;
  std::string failure;
};
thread_local owned mine;

void switch_to_fiber(fiber& f) {
  engine& e = now;
  e.current = &f;
  e.on_fiber = true;
#ifdef MLKIT_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&e.fake_stack, reinterpret_cast<void*>(f.stack), stack_bytes);
#endif
  mlkit_cuda_emulation_switch(&e.scheduler, f.stack_pointer);
#ifdef MLKIT_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(e.fake_stack, nullptr, nullptr);
#endif
  e.on_fiber = false;
}

void switch_to_scheduler(bool for_good) {
  engine& e = now;
  fiber& f = *e.current;
  (void)for_good;
#ifdef MLKIT_EMULATION_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f.fake_stack, e.scheduler_stack, e.scheduler_stack_bytes);
#endif
  mlkit_cuda_emulation_switch(&f.stack_pointer, e.scheduler);
#ifdef MLKIT_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(f.fake_stack, &e.scheduler_stack, &e.scheduler_stack_bytes);
#endif
}

struct work {
  const void* kernel;
  kernel_call call;
  const void* parameters;
};
thread_local work the_work;

// Where a fiber begins.
void run_thread() {
#ifdef MLKIT_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &now.scheduler_stack, &now.scheduler_stack_bytes);
#endif
  watching = instrumented;
  the_work.call(the_work.kernel, the_work.parameters);
  watching = false;
  now.current->state = state::done;
  switch_to_scheduler(true);
  std::abort();
}

std::string triple(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}
std::string place(const fiber& f) {
  return std::string(f.waits_in) + " at " + base_name(f.file) + ":" + std::to_string(f.line);
}
bool same_place(const fiber& a, const fiber& b) {
  const auto same = [](const char* x, const char* y) { return x == y || std::strcmp(x, y) == 0; };
  return a.line == b.line && same(a.waits_in, b.waits_in) && same(a.file, b.file);
}

// What each thread waits for, runs of threads together: "threads 0 to 31 wait in __syncthreads at x.cu:7".
std::string who_waits_where() {
  const fiber* fibers = now.fibers;
  std::string text;
  int groups = 0;
  for (unsigned i = 0; i < now.threads;) {
    unsigned j = i + 1;
    const auto alike = [&](const fiber& a, const fiber& b) {
      return (a.state == state::done) == (b.state == state::done) && (a.state == state::done || same_place(a, b));
    };
    while (j < now.threads && alike(fibers[i], fibers[j])) ++j;
    text += text.empty() ? "" : "; ";
    if (++groups > 6) return text + "...";
    text +=
        j == i + 1 ? "thread " + std::to_string(i) : "threads " + std::to_string(i) + " to " + std::to_string(j - 1);
    const bool one = j == i + 1;
    if (fibers[i].state == state::done)
      text += one ? " has returned" : " have returned";
    else
      text += (one ? " waits in " : " wait in ") + place(fibers[i]);
    i = j;
  }
  return text;
}

[[noreturn]] void throw_failure() {
  std::string text = "CUDA emulation: kernel " + now.running->kernel + ", block " + triple(now.block);
  // The text of a fault of one thread begins with "thread".
  text += ": " + mine.failure;
  throw fault(text);
}

void join_clocks(const std::uint32_t warps) {
  clocks& t = now.time;
  for (std::uint32_t a = 0; a < most_warps; ++a) {
    std::uint32_t most = 0;
    for (std::uint32_t b = 0; b < most_warps; ++b)
      if (warps >> b & 1) most = std::max(most, t.known[b][a]);
    if (warps >> a & 1) most = t.now[a];
    for (std::uint32_t b = 0; b < most_warps; ++b)
      if (warps >> b & 1) t.known[b][a] = std::max(t.known[b][a], most);
  }
  for (std::uint32_t a = 0; a < most_warps; ++a)
    if (warps >> a & 1) ++t.now[a];
}

void release_barrier(int id) {
  fiber* first = nullptr;
  std::uint32_t warps = 0;
  for (unsigned i = 0; i < now.threads; ++i) {
    fiber& f = now.fibers[i];
    if (f.state != state::at_barrier || f.barrier != id) continue;
    if (!first) first = &f;
    if (!same_place(*first, f))
      fail([&] {
        return "divergent barrier: thread " + std::to_string(first->thread) + " waits in " + place(*first) +
               ", thread " + std::to_string(f.thread) + " in " + place(f);
      });
    warps |= 1u << (f.thread / 32);
    f.state = state::ready;
  }
  now.arrived[id].count = 0;
  join_clocks(warps);
}

void begin_block(unsigned rank, const uint3& index) {
  engine& e = now;
  static_cast<block_state&>(e) = {};
  e.block = index;
  e.rank = rank;
  e.generation = ++e.begun;
  for (auto& t : e.time.now) t = 1;
  e.fibers = mine.fibers.data() + rank * e.threads;
  const dim3 size = e.running->block;
  for (unsigned i = 0; i < e.threads; ++i) {
    fiber& f = e.fibers[i];
    f.stack = mine.of_fibers[rank * e.threads + i];
#ifdef MLKIT_EMULATION_ASAN
    ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(f.stack), stack_bytes);
    f.fake_stack = nullptr;
#endif
    f.stack_pointer = first_stack_pointer(f.stack + stack_bytes, run_thread);
    f.thread = i;
    f.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    f.state = state::ready;
    f.copies.clear();
    f.groups = 0;
    f.arrivals = f.waits = 0;
  }
  begin_block_of_memory();
  begin_block_of_hopper();
}

// How many phases of the cluster's barrier are over: those at which all threads that have not returned have arrived.
unsigned cluster_phases() {
  unsigned least = ~0u;
  for (unsigned i = 0; i < now.blocks * now.threads; ++i)
    if (const fiber& f = mine.fibers[i]; f.state != state::done) least = std::min(least, f.arrivals);
  return least;
}

// Lets the threads of a block take turns until none of them can go on. Whether any did.
bool run_block() {
  engine& e = now;
  bool any = false;
  for (bool moved = true; moved;) {
    moved = false;
    const unsigned phases = e.waiting_for_cluster > 0 ? cluster_phases() : 0;
    for (unsigned k = 0; k < e.threads; ++k) {
      fiber& f = e.fibers[turn_order == turns::forward ? k : e.threads - 1 - k];
      if (f.state == state::at_cluster_barrier && f.waits < phases) {
        f.state = state::ready;
        --e.waiting_for_cluster;
      }
      if (f.state != state::ready) continue;
      moved = any = true;
      switch_to_fiber(f);
      if (e.failed) throw_failure();
      if (f.state == state::done) ++e.done;
    }
  }
  return any;
}

void keep_block() {
  kept_block& kept = mine.blocks[now.rank];
  kept.state = now;
  exchange_block_of_hopper(kept.hopper);
  keep_block_of_memory(now.rank);
}
void bring_block(unsigned rank) {
  kept_block& kept = mine.blocks[rank];
  static_cast<block_state&>(now) = kept.state;
  exchange_block_of_hopper(kept.hopper);
  bring_block_of_memory(rank);
}

[[noreturn]] void fail_in_vain() {
  mine.failure = "threads wait for each other in vain: " + who_waits_where();
  throw_failure();
}

// A block of a cluster goes on until all of its threads wait; then the next one does.
void run_cluster(const uint3& first) {
  engine& e = now;
  const dim3 size = e.running->cluster;
  const auto returned = [&](unsigned rank) { return mine.blocks[rank].state.done == e.threads; };
  begin_cluster_of_memory(e.blocks);
  if (mine.blocks.size() < e.blocks) mine.blocks.resize(e.blocks);
  for (unsigned rank = 0; rank < e.blocks; ++rank) {
    begin_block(rank, {first.x + rank % size.x, first.y + rank / size.x % size.y, first.z + rank / (size.x * size.y)});
    keep_block();
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned k = 0; k < e.blocks; ++k) {
      const unsigned rank = turn_order == turns::forward ? k : e.blocks - 1 - k;
      if (returned(rank)) continue;
      bring_block(rank);
      moved = run_block() || moved;
      keep_block();
    }
  }
  for (unsigned rank = 0; rank < e.blocks; ++rank)
    if (!returned(rank)) {
      bring_block(rank);
      fail_in_vain();
    }
}

}  // namespace

void take_turns(turns order) { turn_order = order; }

void run_grid(grid& g, const void* kernel, kernel_call call, const void* parameters) {
  engine& e = now;
  if (e.running) throw fault("CUDA emulation: a kernel launches a kernel");
  e.running = &g;
  the_work = {kernel, call, parameters};
  gridDim = {g.size.x, g.size.y, g.size.z};
  blockDim = {g.block.x, g.block.y, g.block.z};
  struct finally {
    ~finally() {
      now.running = nullptr;
      now.on_fiber = false;
      now.failed = false;
      watching = false;
    }
  } const at_the_end;
  begin_grid_of_memory();
  e.threads = g.block.x * g.block.y * g.block.z;
  e.blocks = g.cluster.x * g.cluster.y * g.cluster.z;
  if (mine.fibers.size() < std::size_t{e.threads} * e.blocks) mine.fibers.resize(std::size_t{e.threads} * e.blocks);
  const dim3 clusters{g.size.x / g.cluster.x, g.size.y / g.cluster.y, g.size.z / g.cluster.z};
  const std::uint64_t count = std::uint64_t{clusters.x} * clusters.y * clusters.z;
  for (std::uint64_t k = 0; k < count; ++k) {
    const std::uint64_t i = turn_order == turns::forward ? k : count - 1 - k;
    const uint3 first{static_cast<unsigned>(i % clusters.x) * g.cluster.x,
                      static_cast<unsigned>(i / clusters.x % clusters.y) * g.cluster.y,
                      static_cast<unsigned>(i / clusters.x / clusters.y) * g.cluster.z};
    if (e.blocks > 1) {
      run_cluster(first);
    } else {
      begin_block(0, first);
      run_block();
      if (e.done < e.threads) fail_in_vain();
    }
  }
}

bool has_returned(unsigned rank) { return rank != now.rank && mine.blocks[rank].state.done == now.threads; }

void note_failure(const std::string& text) {
  if (!now.on_fiber) throw fault("CUDA emulation: " + text);
  now.failed = true;
  mine.failure = "thread " + triple(now.current->index) + ": " + text;
}

void leave_turn() { switch_to_scheduler(false); }

void leave_for_good() {
  switch_to_scheduler(true);
  std::abort();
}

uint3 thread_index() noexcept { return now.current->index; }
uint3 block_index() noexcept { return now.block; }
unsigned lane_index() noexcept { return now.current->thread % 32; }
void* dynamic_shared_memory() noexcept { return now.shared; }

void barrier(int id, int threads, const char* name, int line, const char* file) {
  const unwatched here;
  engine& e = now;
  fiber& self = *e.current;
  if (id < 0 || id >= barriers) fail([&] { return "barrier " + std::to_string(id) + "; there are 0 to 15"; });
  if (threads < 0 || threads % 32 != 0 || static_cast<unsigned>(threads) > round_to_warps(e.threads))
    fail([&] {
      return std::string(name) + " of " + std::to_string(threads) + " threads; a block of " +
             std::to_string(e.threads) + " needs a multiple of 32 of at most as many";
    });
  self.state = state::at_barrier;
  self.barrier = id;
  self.threads = threads;
  self.waits_in = name;
  self.file = file;
  self.line = line;
  const unsigned wanted = threads == 0 ? e.threads : std::min(static_cast<unsigned>(threads), e.threads);
  arrivals& there = e.arrived[id];
  if (there.count == 0) there.first = self.thread;
  if (const int others = e.fibers[there.first].threads; others != threads)
    fail([&] {
      return "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads, where thread " +
             std::to_string(there.first) + " waits for " + std::to_string(others);
    });
  if (++there.count == wanted) release_barrier(id);
  if (self.state != state::ready) switch_to_scheduler(false);
}

void meet(warp_call& call, int line, const char* file) {
  const unwatched here;
  engine& e = now;
  fiber& self = *e.current;
  const unsigned lane = self.thread % 32, first = self.thread - lane;
  if (!(call.mask >> lane & 1))
    fail([&] { return std::string(call.name) + ": the mask does not name the calling lane"; });
  self.state = state::in_warp;
  self.call = &call;
  self.waits_in = call.name;
  self.file = file;
  self.line = line;
  warp_call* lanes[32] = {};
  for (unsigned i = 0; i < 32; ++i) {
    if (!(call.mask >> i & 1)) continue;
    if (first + i >= e.threads || e.fibers[first + i].state == state::done)
      fail([&] {
        return std::string(call.name) + ": the mask names lane " + std::to_string(i) + ", which " +
               (first + i >= e.threads ? "the block does not have" : "has returned");
      });
    fiber& f = e.fibers[first + i];
    if (f.state != state::in_warp) {
      switch_to_scheduler(false);  // whoever comes last does it for all
      return;
    }
    if (f.call->mask != call.mask || f.call->evaluate != call.evaluate || !same_place(f, self))
      fail([&] {
        return std::string(call.name) + ": lane " + std::to_string(i) + ", which the mask names, is in " + place(f);
      });
    lanes[i] = f.call;
  }
  if (call.evaluate) call.evaluate(lanes);
  for (unsigned i = 0; i < 32; ++i)
    if (lanes[i]) e.fibers[first + i].state = state::ready;
  ++e.time.now[self.thread / 32];
}

// ---- clusters

int cluster_rank() { return static_cast<int>(now.rank); }

namespace {
// The lanes of a warp do it together; each of them counts.
void at_cluster_barrier(const char* name, int line, const char* file) {
  warp_call call{.name = name, .mask = 0xffffffffu, .evaluate = nullptr};
  meet(call, line, file);
}
}  // namespace

void cluster_arrive(int line, const char* file) {
  const unwatched here;
  fiber& self = *now.current;
  if (self.arrivals > self.waits)
    fail([] { return std::string("cluster_arrive again, without a cluster_wait between"); });
  auto& happened = now.arrived_in_cluster[self.arrivals % 2];
  const unsigned warp = self.thread / 32;
  for (unsigned w = 0; w < most_warps; ++w) happened[w] = std::max(happened[w], now.time.known[warp][w]);
  happened[warp] = std::max(happened[warp], now.time.now[warp]);
  at_cluster_barrier("cluster_arrive", line, file);
  ++self.arrivals;
}

void cluster_wait(int line, const char* file) {
  const unwatched here;
  fiber& self = *now.current;
  if (self.arrivals == self.waits) fail([] { return std::string("cluster_wait without a cluster_arrive before it"); });
  at_cluster_barrier("cluster_wait", line, file);
  self.state = state::at_cluster_barrier;
  ++now.waiting_for_cluster;
  self.waits_in = "cluster_wait";
  self.file = file;
  self.line = line;
  switch_to_scheduler(false);
  const unsigned warp = self.thread / 32;
  const auto& happened = now.arrived_in_cluster[self.waits % 2];
  for (unsigned w = 0; w < most_warps; ++w) now.time.known[warp][w] = std::max(now.time.known[warp][w], happened[w]);
  ++self.waits;
}

}  // namespace cuda_emulation
