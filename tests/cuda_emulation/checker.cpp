// Looks at each access of a kernel to memory: is it there, has it been written, and is the access ordered after those
// of other threads that it must not overtake.
#include <algorithm>
#include <cstring>
#include <memory>
#include <set>

#include "internal.hpp"

#ifdef MLKIT_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_emulation {

bool instrumented = false;
thread_local constinit bool watching = false;

namespace {

thread_local constinit traffic asked_for;

constexpr std::size_t line_bytes = 64;

// Who touched a byte of shared memory last, and when. Of readers the last two different ones.
struct stamp {
  std::uint32_t bits = 0;  // 0: nobody

  stamp() = default;
  stamp(unsigned thread, std::uint32_t time, bool atomic) : bits(time << 12 | (atomic ? 0x800u : 0u) | (thread + 1)) {}
  explicit operator bool() const { return bits != 0; }
  unsigned thread() const { return (bits & 0x7ff) - 1; }
  bool atomic() const { return bits & 0x800; }
  std::uint32_t time() const { return bits >> 12; }
};
constexpr std::uint32_t most_time = (1u << 20) - 1;

struct cell {
  stamp write, read, read_before;
  // A copy is under way, which this thread waits for: index + 1.
  std::uint16_t copy = 0;
  bool ever = false;  // written
  // At how many of its cluster's barriers the last writer had arrived, and a reader in another block, plus 1.
  std::uint32_t written_after = 0, read_elsewhere_after = 0;
};

// A range of shared memory, and what is known of it. What is known of earlier blocks is forgotten line by line, when it
// is first touched.
struct space {
  std::uintptr_t begin = 0;
  std::size_t bytes = 0;  // that may be
  std::vector<cell> cells;
  std::vector<std::uint32_t> generations;  // of blocks, by line
  std::vector<std::uint16_t> owner;        // by byte: which variable, from 1; 0 is none. Empty: all are one

  void resize(std::uintptr_t begin_, std::size_t capacity) {
    begin = begin_;
    bytes = capacity;
    const std::size_t lines = (capacity + line_bytes - 1) / line_bytes;
    cells.resize(lines * line_bytes);
    generations.resize(lines);
  }

  // Beside a variable in shared memory there may be others that are the host's, and stay as they are.
  void renew(std::size_t from, std::size_t count) {
    for (std::size_t line = from / line_bytes; line <= (from + count - 1) / line_bytes; ++line) {
      if (generations[line] == now.generation) continue;
      generations[line] = now.generation;
      for (std::size_t i = line * line_bytes; i < (line + 1) * line_bytes; ++i) {
        cells[i] = {};
        if (i < bytes && (owner.empty() || owner[i] == owner[from]))
          *reinterpret_cast<unsigned char*>(begin + i) = 0xff;
      }
    }
  }
};

// What a block's shared memory holds, and what is known of it, while another block of its cluster has its turn.
struct kept_space {
  std::vector<cell> cells;
  std::vector<std::uint32_t> generations;
  std::vector<unsigned char> bytes;
};
struct kept_memory {
  kept_space dynamic, variables;
  std::uint32_t generation = 0;
};

struct spaces {
  space dynamic, variables;
  std::vector<kept_memory> of_cluster;
  unsigned char* buffer = nullptr;
  std::vector<const void*> kernel_of = kernels_of_variables();
  std::set<const void*> launched;

  // Free bytes around it, so that what goes a little too far is known for what it is.
  static constexpr std::size_t margin = 1 << 16;

  spaces() {
    buffer = static_cast<unsigned char*>(std::aligned_alloc(1024, most_shared + 2 * margin + 1024));
    // A multiple of 128, and of no more: kernels may not count on it.
    dynamic.resize(reinterpret_cast<std::uintptr_t>(buffer) + margin + 128, most_shared);
    const local_block block = thread_local_block();
    if (block.bytes == 0) return;
    variables.resize(block.begin, block.bytes);
    const auto& all = shared_variables();
    if (all.empty()) {  // the program is stripped
      variables.bytes = 0;
      return;
    }
    variables.owner.resize(block.bytes);
    for (std::size_t i = 0; i < all.size() && i < 0xffff; ++i)
      std::fill_n(variables.owner.begin() + static_cast<std::ptrdiff_t>(all[i].offset), all[i].bytes,
                  static_cast<std::uint16_t>(i + 1));
  }
  ~spaces() { std::free(buffer); }
  spaces(const spaces&) = delete;
  spaces& operator=(const spaces&) = delete;
};
thread_local std::unique_ptr<spaces> the_spaces;
thread_local spaces* here = nullptr;  // the same, without asking whether it has been made

const char* verb(access_kind how) {
  switch (how) {
    case access_kind::read: return "reads ";
    case access_kind::write: return "writes ";
    default: return "atomically changes ";
  }
}

std::string bytes_of(access_kind how, std::size_t bytes) {
  return verb(how) + std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

std::string who_else(unsigned thread) {
  const uint3 i = now.fibers[thread].index;
  return "thread (" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// "offset 3 of shared variable f()::x of 16 bytes".
std::string where(const space& s, std::size_t offset) {
  if (&s == &here->dynamic)
    return "offset " + std::to_string(offset) + " of dynamic shared memory of " + std::to_string(s.bytes) + " bytes";
  const shared_variable& v = shared_variables()[s.owner[offset] - 1u];
  return "offset " + std::to_string(offset - v.offset) + " of shared variable " + demangled(v.name) + " of " +
         std::to_string(v.bytes) + " bytes";
}

// Whether the kernel that runs may use a variable: not that of another kernel.
bool may_use(std::uint16_t owner) {
  if (owner == 0) return false;
  const void* kernel = here->kernel_of[owner - 1u];
  return !kernel || kernel == now.running->function;
}

// For messages: behind which variable an access is that hits none, or another kernel's.
std::string beside_variables(std::size_t offset, std::size_t bytes, access_kind how) {
  const auto& owner = here->variables.owner;
  std::size_t at = offset;
  while (at > 0 && !may_use(owner[at])) --at;
  std::string text = bytes_of(how, bytes) + " out of bounds";
  if (!may_use(owner[at])) return text + " of shared memory";
  const shared_variable& v = shared_variables()[owner[at] - 1u];
  return text + ": offset " + std::to_string(offset - v.offset) + " of shared variable " + demangled(v.name) + " of " +
         std::to_string(v.bytes) + " bytes";
}

// Whether what `before` says happened before what the thread does now.
bool ordered(const fiber& who, stamp before) {
  const unsigned other = before.thread();
  if (other == who.thread) return true;
  const unsigned warp = who.thread / 32, others = other / 32;
  if (warp == others) return before.time() < now.time.now[warp];
  return before.time() <= now.time.known[warp][others] && now.time.known[warp][others] != 0;
}

void check_shared(space& s, fiber& who, std::size_t offset, std::size_t bytes, access_kind how) {
  s.renew(offset, bytes);
  const std::uint32_t time = now.time.now[who.thread / 32];
  if (time > most_time) fail([] { return std::string("more meetings of a warp than the emulation can tell apart"); });
  const bool atomic = how == access_kind::atomic;
  const stamp mine(who.thread, time, atomic);
  cell* const cells = s.cells.data() + offset;
  for (std::size_t i = 0; i < bytes; ++i) {
    cell& c = cells[i];
    const auto race = [&](stamp other, const char* what) {
      fail([&] {
        return bytes_of(how, bytes) + " at " + where(s, offset + i) + ", which " + who_else(other.thread()) + what +
               ", and no barrier lies between";
      });
    };
    if (c.copy)
      fail([&] {
        return bytes_of(how, bytes) + " at " + where(s, offset + i) + ", where a cp.async of " + who_else(c.copy - 1u) +
               " is under way that has not been waited for";
      });
    if (c.write && c.write.bits != mine.bits && !(atomic && c.write.atomic()) && !ordered(who, c.write))
      race(c.write, c.write.atomic() ? " changed atomically" : " wrote");
    if (how != access_kind::write && !c.ever)
      fail([&] { return bytes_of(how, bytes) + " at " + where(s, offset + i) + ", which nobody has written"; });
    if (how == access_kind::read) {
      if (c.read.bits == mine.bits) continue;
      if (c.read && c.read.thread() != who.thread) c.read_before = c.read;
      c.read = mine;
    } else {
      if (c.read && !ordered(who, c.read)) race(c.read, " read");
      if (c.read_before && !ordered(who, c.read_before)) race(c.read_before, " read");
      if (who.waits < c.read_elsewhere_after)
        fail([&] {
          return bytes_of(how, bytes) + " at " + where(s, offset + i) +
                 ", which another block of the cluster reads, and no cluster barrier lies between";
        });
      c.write = mine;
      c.written_after = who.arrivals;
      c.ever = true;
    }
  }
}

[[noreturn]] void fail_device(const void* p, std::size_t bytes, access_kind how, std::size_t good) {
  fail([&] {
    return bytes_of(how, bytes) +
           " out of bounds: " + where_in_device_memory(reinterpret_cast<std::uintptr_t>(p) + good);
  });
}

void check_device(const void* p, std::size_t bytes, access_kind how) {
  if (how != access_kind::write) asked_for.read += bytes;
  if (how != access_kind::read) asked_for.written += bytes;
  unsigned char* const states = arena_state + (reinterpret_cast<std::uintptr_t>(p) - arena_begin);
  bool good = true;
  for (std::size_t i = 0; i < bytes; ++i) good &= states[i] == set;
  if (good) return;
  const std::size_t addressable = addressable_bytes(p, bytes);
  if (addressable < bytes) fail_device(p, bytes, how, addressable);
  if (how == access_kind::write || !instrumented) {
    std::memset(states, set, bytes);
    return;
  }
  fail([&] {
    const auto at = static_cast<std::size_t>(std::find(states, states + bytes, unset) - states);
    return bytes_of(how, bytes) +
           " that nobody has written: " + where_in_device_memory(reinterpret_cast<std::uintptr_t>(p) + at);
  });
}

void check_any(fiber& who, const void* p, std::size_t bytes, access_kind how) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  if (address - who.stack < stack_bytes) return;
  if (is_device_memory(p)) return check_device(p, bytes, how);

  space& dynamic = here->dynamic;
  if (address - (dynamic.begin - spaces::margin) < most_shared + 2 * spaces::margin) {
    const std::size_t offset = address - dynamic.begin;
    if (offset >= dynamic.bytes || bytes > dynamic.bytes - offset)
      fail([&] {
        return bytes_of(how, bytes) + " out of bounds: offset " + std::to_string(static_cast<std::ptrdiff_t>(offset)) +
               " of dynamic shared memory of " + std::to_string(dynamic.bytes) + " bytes";
      });
    if (instrumented) check_shared(dynamic, who, offset, bytes, how);
    return;
  }

  const auto inside = [&](const uint3& v) { return address - reinterpret_cast<std::uintptr_t>(&v) < sizeof v; };
  if (how == access_kind::read && (inside(gridDim) || inside(blockDim))) return;

  space& variables = here->variables;
  if (address - variables.begin < variables.bytes) {
    const std::size_t offset = address - variables.begin;
    const auto owner = variables.owner[offset];
    const auto last = variables.owner[std::min(offset + bytes, variables.bytes) - 1];
    if (!may_use(owner) || owner != last) fail([&] { return beside_variables(offset, bytes, how); });
    if (instrumented) check_shared(variables, who, offset, bytes, how);
    return;
  }

  const grid& g = *now.running;
  if (how == access_kind::read && (address - g.parameters < g.parameter_bytes || is_constant(address))) return;
  if (p == nullptr || address < 4096)
    fail([&] { return bytes_of(how, bytes) + " at a null pointer, offset " + std::to_string(address); });
  for (unsigned i = 0; i < now.threads; ++i)
    if (address - now.fibers[i].stack < stack_bytes)
      fail([&] { return bytes_of(how, bytes) + " of the local variables of " + who_else(i); });
  fail([&] { return bytes_of(how, bytes) + " of host memory"; });
}

}  // namespace

bool watches_memory() { return instrumented; }
traffic device_traffic() { return asked_for; }

void begin_grid_of_memory() {
  if (!here) {
    the_spaces = std::make_unique<spaces>();
    here = the_spaces.get();
  }
  if (here->launched.insert(now.running->function).second) claim_variables(now.running->function, here->kernel_of);
}

void begin_block_of_memory() {
#ifdef MLKIT_EMULATION_ASAN
  if (here->dynamic.bytes != now.running->shared || !now.shared) {
    ASAN_POISON_MEMORY_REGION(here->buffer, most_shared + 2 * spaces::margin + 1024);
    ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(here->dynamic.begin), now.running->shared);
  }
#endif
  here->dynamic.bytes = now.running->shared;
  now.shared = reinterpret_cast<unsigned char*>(here->dynamic.begin);
  if (!instrumented) std::memset(now.shared, 0xff, now.running->shared);
}

void begin_cluster_of_memory(unsigned blocks) {
  auto& all = here->of_cluster;
  if (all.size() < blocks) all.resize(blocks);
  for (unsigned i = 0; i < blocks; ++i) {
    for (const auto& [kept, space] :
         {std::pair(&all[i].dynamic, &here->dynamic), std::pair(&all[i].variables, &here->variables)}) {
      kept->cells.resize(space->cells.size());
      kept->generations.resize(space->generations.size());
    }
    all[i].dynamic.bytes.resize(now.running->shared);
    all[i].variables.bytes.resize(here->variables.bytes);
  }
}

namespace {
// Calls with the parts of this block's shared memory, and with where they are kept.
template <class F>
void each_part(kept_memory& kept, F f) {
  f(now.shared, kept.dynamic.bytes.data(), now.running->shared);
  const auto& variables = shared_variables();
  for (std::size_t i = 0; i < variables.size() && here->variables.bytes > 0; ++i)
    if (may_use(static_cast<std::uint16_t>(i + 1)))
      f(reinterpret_cast<unsigned char*>(here->variables.begin + variables[i].offset),
        kept.variables.bytes.data() + variables[i].offset, variables[i].bytes);
}
void exchange(kept_memory& kept) {
  for (const auto& [of, space] :
       {std::pair(&kept.dynamic, &here->dynamic), std::pair(&kept.variables, &here->variables)}) {
    std::swap(of->cells, space->cells);
    std::swap(of->generations, space->generations);
  }
}
}  // namespace

void keep_block_of_memory(unsigned rank) {
  kept_memory& kept = here->of_cluster[rank];
  each_part(kept, [](unsigned char* memory, unsigned char* to, std::size_t bytes) { std::copy_n(memory, bytes, to); });
  exchange(kept);
  kept.generation = now.generation;
}
void bring_block_of_memory(unsigned rank) {
  kept_memory& kept = here->of_cluster[rank];
  each_part(kept, [](unsigned char* memory, const unsigned char* from, std::size_t bytes) {
    std::copy_n(from, bytes, memory);
  });
  exchange(kept);
}

float load_cluster(const float* shared, int rank) {
  const unwatched quietly;
  const fiber& self = *now.current;
  if (rank < 0 || static_cast<unsigned>(rank) >= now.blocks)
    fail([&] {
      return "load_cluster of block " + std::to_string(rank) + " of a cluster of " + std::to_string(now.blocks);
    });
  const auto other = static_cast<unsigned>(rank);
  const auto address = reinterpret_cast<std::uintptr_t>(shared);
  if (address % sizeof(float) != 0 || !is_shared_memory(shared))
    fail([] { return std::string("load_cluster at what is no multiple of 4 in shared memory"); });
  if (other == now.rank) {
    check(shared, sizeof(float), access_kind::read);
    return *shared;
  }
  const auto says = [&](const char* what) {
    fail([&] { return "load_cluster of block " + std::to_string(rank) + " of the cluster" + what; });
  };
  if (has_returned(other)) says(", whose threads have all returned");
  const bool dynamic = address - here->dynamic.begin < most_shared;
  const space& s = dynamic ? here->dynamic : here->variables;
  const std::size_t offset = address - s.begin;
  if (dynamic ? offset + sizeof(float) > s.bytes : !may_use(s.owner[offset]) || s.owner[offset] != s.owner[offset + 3])
    says(" out of bounds of its shared memory");
  kept_memory& kept = here->of_cluster[other];
  kept_space& there = dynamic ? kept.dynamic : kept.variables;
  for (std::size_t i = offset; instrumented && i < offset + sizeof(float); ++i) {
    cell& c = there.cells[i];
    if (there.generations[i / line_bytes] != kept.generation || !c.ever) says(", which nobody there has written");
    if (c.copy) says(", where a cp.async is under way");
    if (self.waits <= c.written_after) says(", which was written there, and no cluster barrier lies between");
    c.read_elsewhere_after = std::max(c.read_elsewhere_after, self.arrivals + 1);
  }
  float value;
  std::memcpy(&value, there.bytes.data() + offset, sizeof value);
  return value;
}

bool is_shared_memory(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  return address - here->dynamic.begin < most_shared || address - here->variables.begin < here->variables.bytes;
}

// Dynamic shared memory begins at 1152, variables at 2^20: 18 bits, of which wgmma's descriptors have room for 18,
// reach the former only.
constexpr std::uint32_t first_address = 1024 + 128, first_variable = 1 << 20;

std::uint32_t shared_address(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  if (address - here->dynamic.begin < most_shared)
    return first_address + static_cast<std::uint32_t>(address - here->dynamic.begin);
  return first_variable + static_cast<std::uint32_t>(address - here->variables.begin);
}
void* shared_pointer(std::uint32_t address) {
  return reinterpret_cast<void*>(address >= first_variable ? here->variables.begin + (address - first_variable)
                                                           : here->dynamic.begin + (address - first_address));
}

void check(const void* p, std::size_t bytes, access_kind how) {
  if (bytes != 0) check_any(*now.current, p, bytes, how);
}
void check_by(fiber& who, const void* p, std::size_t bytes, access_kind how) {
  fiber* const before = now.current;
  now.current = &who;  // whom a message names
  check_any(who, p, bytes, how);
  now.current = before;
}

namespace {
template <class F>
void each_cell(const void* shared, std::size_t bytes, F f) {
  const auto address = reinterpret_cast<std::uintptr_t>(shared);
  space& s = address - here->dynamic.begin < most_shared ? here->dynamic : here->variables;
  for (std::size_t i = 0; i < bytes; ++i) f(s.cells[address - s.begin + i]);
}
}  // namespace

void copy_began(const void* shared, std::size_t bytes) {
  if (!instrumented) return;
  each_cell(shared, bytes, [](cell& c) { c.copy = static_cast<std::uint16_t>(now.current->thread + 1); });
}
void copy_ended(const void* shared, std::size_t bytes) {
  if (!instrumented) return;
  const stamp mine(now.current->thread, now.time.now[now.current->thread / 32], false);
  each_cell(shared, bytes, [&](cell& c) {
    c.copy = 0;
    c.write = mine;
    c.written_after = now.current->arrivals;
    c.ever = true;
  });
}

void touch(const void* p, std::size_t bytes, std::size_t alignment, bool write) {
  const unwatched quietly;
  if (reinterpret_cast<std::uintptr_t>(p) % alignment != 0)
    fail([&] {
      return bytes_of(write ? access_kind::write : access_kind::read, bytes) +
             " at an address that is no multiple of " + std::to_string(alignment);
    });
  check(p, bytes, write ? access_kind::write : access_kind::read);
}
void touch_atomically(const void* p, std::size_t bytes) {
  const unwatched quietly;
  check(p, bytes, access_kind::atomic);
}

}  // namespace cuda_emulation
