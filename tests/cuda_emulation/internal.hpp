// What the parts of the emulation know of each other.
#pragma once

#include <mlkit_cuda_emulation/kernel.hpp>
#include <mlkit_cuda_emulation/runtime.hpp>
#include <mlkit_cuda_emulation/testing.hpp>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define MLKIT_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MLKIT_EMULATION_ASAN 1
#endif
#endif

namespace cuda_emulation {

// ---- symbols.cpp: what the program's symbol table says

struct shared_variable {
  std::size_t offset, bytes;  // in a thread's block of thread-local variables
  const char* name;           // mangled
};
const std::vector<shared_variable>& shared_variables();
/// The calling thread's block of thread-local variables.
struct local_block {
  std::uintptr_t begin;
  std::size_t bytes;
};
local_block thread_local_block();
bool is_constant(std::uintptr_t address);  // in the program's read-only data
/// In whose body each of them is declared; null for those of functions that are no kernels, or are not known as such
/// because they have internal linkage.
std::vector<const void*> kernels_of_variables();
/// Notes which variables belong to a kernel that may not have been known as one.
void claim_variables(const void* kernel, std::vector<const void*>& kernels);
std::string function_name(const void* function);
std::string demangled(const char* name);

// ---- memory.cpp: device memory

// Addresses of device memory, none of which is handed out twice.
extern std::uintptr_t arena_begin;
extern std::size_t arena_bytes;
// What is known of each byte of it.
enum : unsigned char { unaddressable = 0, unset = 1, set = 2 };
extern unsigned char* arena_state;

inline bool is_device_memory(const void* p) { return reinterpret_cast<std::uintptr_t>(p) - arena_begin < arena_bytes; }
/// The first of so many bytes that is not addressable; `bytes` if all are.
std::size_t addressable_bytes(const void* p, std::size_t bytes);
void mark(void* p, std::size_t bytes, unsigned char state);
/// "offset 20 of an allocation of 16 bytes", for messages.
std::string where_in_device_memory(std::uintptr_t address);

// ---- fibers.cpp: threads

enum class state : unsigned char { ready, at_barrier, in_warp, at_mbarrier, at_cluster_barrier, done };

struct pending_copy {
  void* shared;
  unsigned char bytes[16];
  int group;
};

struct fiber {
  void* stack_pointer = nullptr;
  std::uintptr_t stack = 0;  // its lowest address
  uint3 index{};
  unsigned thread = 0;  // index, as one number
  enum state state = state::done;
  // What it waits for.
  int barrier = 0;
  int threads = 0;
  warp_call* call = nullptr;
  const void* waits_for = nullptr;
  const char* waits_in = "";
  const char* file = "";
  int line = 0;

  std::vector<pending_copy> copies;
  int groups = 0;                    // that were committed
  unsigned arrivals = 0, waits = 0;  // at the barrier of its cluster
#ifdef MLKIT_EMULATION_ASAN
  void* fake_stack = nullptr;
#endif
};

inline constexpr std::size_t stack_bytes = 256 << 10;
inline constexpr int most_threads = 1024, most_warps = most_threads / 32, barriers = 16;

// Time, as far as threads of a block know it. A warp's clock moves on when lanes of it meet; known[a][b] is the time of
// warp b before which all that b did has happened before what a does now.
struct clocks {
  std::uint32_t now[most_warps];
  std::uint32_t known[most_warps][most_warps];
};

struct grid {
  const void* function = nullptr;
  std::string kernel;  // its name
  dim3 size, block, cluster;
  std::size_t shared = 0;
  std::uintptr_t parameters = 0;
  std::size_t parameter_bytes = 0;
};

// At a barrier.
struct arrivals {
  unsigned count, first;
};

// A block, as far as it is not in its fibers and in its memory.
struct block_state {
  uint3 block{};
  unsigned rank = 0;  // in its cluster
  unsigned done = 0;  // threads that have returned
  unsigned waiting_for_cluster = 0;
  std::uint32_t generation = 0;  // of blocks, from 1
  fiber* fibers = nullptr;
  clocks time{};
  arrivals arrived[barriers]{};
  // What has happened before a phase of the cluster's barrier was over, by warp: of phases with even numbers, and odd.
  std::uint32_t arrived_in_cluster[2][most_warps]{};
};

// The kernel that runs on a host thread, and that block of a cluster which has its turn. Made without being asked for,
// so that accesses to it need no guard.
struct engine : block_state {
  fiber* current = nullptr;
  bool on_fiber = false;
  grid* running = nullptr;
  unsigned threads = 0;     // of a block
  unsigned blocks = 1;      // of a cluster
  std::uint32_t begun = 0;  // blocks
  void* scheduler = nullptr;
  bool failed = false;
  unsigned char* shared = nullptr;  // dynamic shared memory
#ifdef MLKIT_EMULATION_ASAN
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
#endif
};
extern thread_local constinit engine now;

inline constexpr std::size_t most_shared = 232448;  // bytes that a block can ask for

/// Lets others go on until `current`'s state is ready again.
void leave_turn();

/// Whether all threads of another block of the cluster have returned.
bool has_returned(unsigned rank);

void note_failure(const std::string& text);
[[noreturn]] void leave_for_good();
/// Ends the kernel: the launch throws `fault` with this text, and with who was at it. The text is made by a call, so
/// that nothing is left on a stack that nobody unwinds.
template <class Text>
[[noreturn]] void fail(Text text) {
  note_failure(text());
  leave_for_good();
}

// ---- checker.cpp: what memory is touched, by whom and when

extern bool instrumented;                     // some of the program tells of each access: hooks.cpp
extern thread_local constinit bool watching;  // what the thread does now is a kernel's work

/// While it lives, accesses are the emulation's own.
class unwatched {
 public:
  unwatched() : before_(watching) { watching = false; }
  ~unwatched() { watching = before_; }
  unwatched(const unwatched&) = delete;
  unwatched& operator=(const unwatched&) = delete;

 private:
  bool before_;
};

enum class access_kind : unsigned char { read, write, atomic };
void check(const void* p, std::size_t bytes, access_kind how);
/// An access by another thread than the current one: a collective's.
void check_by(fiber& who, const void* p, std::size_t bytes, access_kind how);
bool is_shared_memory(const void* p);
void begin_grid_of_memory();
void begin_block_of_memory();
/// Of the blocks of a cluster one has its turn: its shared memory is where kernels find it, that of others is kept.
void begin_cluster_of_memory(unsigned blocks);
void keep_block_of_memory(unsigned rank);
void bring_block_of_memory(unsigned rank);
/// Marks shared memory that a copy is under way to, and that it is there.
void copy_began(const void* shared, std::size_t bytes);
void copy_ended(const void* shared, std::size_t bytes);

}  // namespace cuda_emulation
