// Hopper's barriers in shared memory, copies of boxes, and products by warpgroups, as the PTX manual describes
// mbarrier, cp.async.bulk.tensor and wgmma.
#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "hopper.hpp"
#include "internal.hpp"

namespace cuda_emulation {
namespace {

// What a CUtensorMap holds here: matrices only.
struct matrix_map {
  std::uint64_t known;  // that this is one
  unsigned char* address;
  std::uint64_t extents[2], row_bytes;
  std::uint32_t box[2], element_bytes, swizzle;
};
constexpr std::uint64_t known_map = 0x6d6174726978206d;
static_assert(sizeof(matrix_map) <= sizeof(CUtensorMap));

// The three bits above the lowest four of an address, by which 16 bytes are chosen among 128, mixed with those that
// choose a line: in 128-byte swizzle bits 7 to 9 of the address, in 64-byte swizzle bits 7 and 8, in 32-byte swizzle 7.
std::uintptr_t swizzled(std::uintptr_t address, std::uint32_t swizzle) {
  const std::uintptr_t bits = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : (std::uintptr_t{1} << swizzle) - 1;
  return address ^ ((address >> 7 & bits) << 4);
}

struct box_copy {
  unsigned char* shared;
  matrix_map map;
  int x, y;
  unsigned thread;  // who asked for it
  std::size_t bytes() const { return std::size_t{map.box[0]} * map.box[1] * map.element_bytes; }
};

struct mbarrier {
  int count = 0;                            // arrivals in a phase
  int pending = 0;                          // of them, still to come
  std::int64_t bytes = 0;                   // still to be copied
  unsigned phases = 0;                      // that are over
  std::uint32_t released[most_warps] = {};  // what has happened before the last phase was over, by warp
  std::uint32_t arrived[most_warps] = {};   // the same of arrivals in this phase
  std::vector<box_copy> copies;             // under way
};

struct operand {
  std::uint32_t address, stride;
};

struct product {
  operand a, b;
  bool is_f16, adds;
  int group;
  float* d[32];
};

// A thread's accumulators while products into them are under way: what is in the thread's own is NaN until then.
struct accumulators {
  float* place;
  int last_group;
  float values[128];
};

struct warp_state {
  std::vector<product> products;
  int groups = 0;
  std::vector<accumulators> held[32];
};

struct hopper_state {
  std::map<const void*, mbarrier> barriers;
  warp_state warps[most_warps];
};
thread_local hopper_state all;

mbarrier& find_barrier(const void* p, const char* what) {
  const auto at = all.barriers.find(p);
  if (at == all.barriers.end())
    fail([&] { return std::string(what) + " at what is no barrier that barrier_init has made"; });
  touch_atomically(p, 8);
  return at->second;
}

unsigned my_warp() { return now.current->thread / 32; }

void join_into(std::uint32_t* clock) {
  const unsigned warp = my_warp();
  for (int w = 0; w < most_warps; ++w) clock[w] = std::max(clock[w], now.time.known[warp][w]);
  clock[warp] = std::max(clock[warp], now.time.now[warp]);
}

void wake(const void* barrier) {
  for (unsigned i = 0; i < now.threads; ++i) {
    fiber& f = now.fibers[i];
    if (f.state == state::at_mbarrier && f.waits_for == barrier) f.state = state::ready;
  }
}

void end_phase_if_complete(const void* p, mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  ++b.phases;
  b.pending = b.count;
  std::copy(std::begin(b.arrived), std::end(b.arrived), std::begin(b.released));
  wake(p);
}

void arrive(const void* p, mbarrier& b) {
  if (b.pending == 0) fail([] { return std::string("more arrivals in a phase of a barrier than it was made for"); });
  join_into(b.arrived);
  ++now.time.now[my_warp()];
  --b.pending;
  end_phase_if_complete(p, b);
}

// Makes the copies that are under way: as late as they may be.
void make_copies(const void* p, mbarrier& b) {
  fiber* const self = now.current;
  for (const box_copy& c : std::exchange(b.copies, {})) {
    now.current = &now.fibers[c.thread];
    const std::size_t line = std::size_t{c.map.box[0]} * c.map.element_bytes;
    for (std::uint32_t row = 0; row < c.map.box[1]; ++row)
      for (std::size_t col = 0; col < line; col += 16) {
        unsigned char bytes[16] = {};
        const std::int64_t y = c.y + std::int64_t{row};
        for (std::size_t e = 0; e < 16; e += c.map.element_bytes) {
          const std::int64_t x = c.x + static_cast<std::int64_t>((col + e) / c.map.element_bytes);
          if (x < 0 || y < 0 || x >= static_cast<std::int64_t>(c.map.extents[0]) ||
              y >= static_cast<std::int64_t>(c.map.extents[1]))
            continue;  // zeros
          const unsigned char* from = c.map.address + y * static_cast<std::int64_t>(c.map.row_bytes) +
                                      x * static_cast<std::int64_t>(c.map.element_bytes);
          check(from, c.map.element_bytes, access_kind::read);
          std::memcpy(bytes + e, from, c.map.element_bytes);
        }
        const std::uintptr_t linear = reinterpret_cast<std::uintptr_t>(c.shared) + row * line + col;
        std::memcpy(reinterpret_cast<void*>(swizzled(linear, c.map.swizzle)), bytes, 16);
      }
    copy_ended(c.shared, c.bytes());
    join_into(b.arrived);  // whoever waits for the phase sees what was copied
    ++now.time.now[my_warp()];
    b.bytes -= static_cast<std::int64_t>(c.bytes());
  }
  now.current = self;
  end_phase_if_complete(p, b);
}

}  // namespace

void begin_block_of_hopper() {
  all.barriers.clear();
  for (auto& warp : all.warps) {
    warp.products.clear();
    warp.groups = 0;
    for (auto& held : warp.held) held.clear();
  }
}

void exchange_block_of_hopper(std::shared_ptr<void>& kept) {
  if (!kept) kept = std::make_shared<hopper_state>();
  std::swap(all, *static_cast<hopper_state*>(kept.get()));
}

void mbarrier_init(std::uint64_t* p, int arrivals) {
  const unwatched quietly;
  touch(p, 8, 8, true);
  if (!is_shared_memory(p) || arrivals < 1)
    fail([] { return std::string("barrier_init of a barrier outside shared memory, or of no arrivals"); });
  *p = 0;
  mbarrier b;
  b.count = b.pending = arrivals;
  all.barriers.insert_or_assign(p, std::move(b));
}

void mbarrier_arrive(std::uint64_t* p, std::uint32_t bytes) {
  const unwatched quietly;
  mbarrier& b = find_barrier(p, "barrier_arrive");
  b.bytes += bytes;
  arrive(p, b);
}

void mbarrier_wait(std::uint64_t* p, std::uint32_t parity, int line, const char* file) {
  const unwatched quietly;
  fiber& self = *now.current;
  mbarrier& b = find_barrier(p, "barrier_wait");
  // The phase of that parity is over if the one that is under way has the other.
  while ((b.phases & 1) == parity) {
    if (b.pending == 0 && !b.copies.empty()) {
      make_copies(p, b);
      continue;
    }
    self.state = state::at_mbarrier;
    self.waits_for = p;
    self.waits_in = "barrier_wait";
    self.file = file;
    self.line = line;
    leave_turn();
  }
  clocks& t = now.time;
  const unsigned warp = my_warp();
  for (int w = 0; w < most_warps; ++w) t.known[warp][w] = std::max(t.known[warp][w], b.released[w]);
}

void copy_matrix_box(void* shared, const void* map, std::uint64_t* barrier, int x, int y) {
  const unwatched quietly;
  mbarrier& b = find_barrier(barrier, "copy_box for a barrier");
  box_copy c{static_cast<unsigned char*>(shared), {}, x, y, now.current->thread};
  check(map, sizeof c.map, access_kind::read);
  std::memcpy(&c.map, map, sizeof c.map);
  if (c.map.known != known_map) fail([] { return std::string("copy_box by what is no map of a matrix"); });
  if (reinterpret_cast<std::uintptr_t>(shared) % 128 != 0 || !is_shared_memory(shared))
    fail([] { return std::string("copy_box to an address that is no multiple of 128 in shared memory"); });
  if (c.map.swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && c.map.box[0] * c.map.element_bytes != 16u << c.map.swizzle)
    fail([] { return std::string("the emulation copies boxes only of lines as long as their swizzle"); });
  check(shared, c.bytes(), access_kind::write);
  copy_began(shared, c.bytes());
  b.copies.push_back(c);
}

// ---- wgmma

namespace {

// The start of a matrix of lines of 128 bytes in 128-byte swizzle: PTX manual, "Matrix Descriptor Format".
operand read_descriptor(std::uint64_t d) {
  if (d >> 62 != 1) fail([] { return std::string("the emulation's wgmma knows 128-byte swizzle only"); });
  if (d >> 49 & 7) fail([] { return std::string("the emulation's wgmma knows matrices at multiples of 1024 only"); });
  return {static_cast<std::uint32_t>(d & 0x3fff) << 4, static_cast<std::uint32_t>(d >> 32 & 0x3fff) << 4};
}

// 16 elements along the depth of one line.
void read_line(const operand& o, int line, bool is_f16, float (&values)[16]) {
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t linear = o.address + static_cast<std::uint32_t>(line / 8) * o.stride +
                                 static_cast<std::uint32_t>(line % 8 * 128 + half * 16);
    const void* p = shared_pointer(static_cast<std::uint32_t>(swizzled(linear, CU_TENSOR_MAP_SWIZZLE_128B)));
    check(p, 16, access_kind::read);
    std::uint16_t bits[8];
    std::memcpy(bits, p, 16);
    for (int i = 0; i < 8; ++i)
      values[8 * half + i] = is_f16 ? widen_f16(bits[i]) : std::bit_cast<float>(std::uint32_t{bits[i]} << 16);
  }
}

accumulators& hold(warp_state& warp, unsigned lane, float* d) {
  for (auto& h : warp.held[lane])
    if (h.place == d) return h;
  accumulators& h = warp.held[lane].emplace_back();
  h.place = d;
  std::copy_n(d, 128, h.values);
  std::memset(d, 0xff, sizeof h.values);  // NaN
  return h;
}

void multiply(warp_state& warp, unsigned warp_index, const product& p) {
  static thread_local float b[256][16];
  float* d_of[32];
  for (unsigned lane = 0; lane < 32; ++lane) d_of[lane] = hold(warp, lane, p.d[lane]).values;
  for (int n = 0; n < 256; ++n) read_line(p.b, n, p.is_f16, b[n]);
  for (int r = 0; r < 16; ++r) {
    float a[16];
    read_line(p.a, static_cast<int>(warp_index % 4) * 16 + r, p.is_f16, a);
    for (int n = 0; n < 256; ++n) {
      const auto lane = static_cast<unsigned>(r % 8 * 4 + n % 8 / 2);
      float& d = d_of[lane][n / 8 * 4 + r / 8 * 2 + n % 2];
      double sum = p.adds ? d : 0;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[k]) * b[n][k];
      d = static_cast<float>(sum);
    }
  }
}

void queue_products(warp_call* const* lanes) {
  const unsigned warp_index = my_warp();
  warp_state& warp = all.warps[warp_index];
  product p = *static_cast<const product*>(lanes[0]->in);
  for (unsigned lane = 0; lane < 32; ++lane) {
    const product& of_lane = *static_cast<const product*>(lanes[lane]->in);
    if (std::memcmp(&of_lane.a, &p.a, 2 * sizeof(operand)) != 0 || of_lane.adds != p.adds)
      fail([] { return std::string("wgmma: the lanes of a warp name different operands"); });
    p.d[lane] = static_cast<float*>(lanes[lane]->out);
    hold(warp, lane, p.d[lane]).last_group = warp.groups;
  }
  p.group = warp.groups;
  warp.products.push_back(p);
}

void commit_products(warp_call* const*) { ++all.warps[my_warp()].groups; }

void wait_for_products(warp_call* const* lanes) {
  const unsigned warp_index = my_warp();
  warp_state& warp = all.warps[warp_index];
  const int over = warp.groups - lanes[0]->argument;  // groups before this one
  auto keep = warp.products.begin();
  for (const product& p : warp.products) {
    if (p.group < over)
      multiply(warp, warp_index, p);
    else
      *keep++ = p;
  }
  warp.products.erase(keep, warp.products.end());
  for (auto& held : warp.held)
    std::erase_if(held, [&](const accumulators& h) {
      if (h.last_group >= over) return false;
      std::copy_n(h.values, 128, h.place);
      return true;
    });
}

void together(const char* name, void (*evaluate)(warp_call* const*), int argument, int line, const char* file) {
  const unwatched quietly;
  warp_call call{.name = name, .mask = 0xffffffffu, .evaluate = evaluate, .argument = argument};
  meet(call, line, file);
}

}  // namespace

void warpgroup_multiply(bool is_f16, float* d, std::uint64_t a, std::uint64_t b, bool adds, int line,
                        const char* file) {
  const unwatched quietly;
  const product p{read_descriptor(a), read_descriptor(b), is_f16, adds, 0, {}};
  warp_call call{.name = "wgmma", .mask = 0xffffffffu, .evaluate = queue_products, .in = &p, .out = d};
  meet(call, line, file);
}
void warpgroup_commit(int line, const char* file) { together("wgmma.commit_group", commit_products, 0, line, file); }
void warpgroup_wait(int groups, int line, const char* file) {
  together("wgmma.wait_group", wait_for_products, groups, line, file);
}
void warpgroup_fence(int line, const char* file) {
  together(
      "wgmma.fence", [](warp_call* const*) {}, 0, line, file);
}

}  // namespace cuda_emulation

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  using namespace cuda_emulation;
  matrix_map m{};
  m.known = known_map;
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_UINT16: m.element_bytes = 2; break;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_UINT32: m.element_bytes = 4; break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: m.element_bytes = 1; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (rank != 2) return CUDA_ERROR_NOT_SUPPORTED;
  const std::uint64_t line = std::uint64_t{box[0]} * m.element_bytes;
  if (reinterpret_cast<std::uintptr_t>(map) % 64 != 0 || reinterpret_cast<std::uintptr_t>(address) % 16 != 0 ||
      strides[0] % 16 != 0 || strides[0] >= std::uint64_t{1} << 40 || line % 16 != 0)
    return CUDA_ERROR_INVALID_VALUE;
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && line > 16u << swizzle) return CUDA_ERROR_INVALID_VALUE;
  for (int d = 0; d < 2; ++d) {
    if (extents[d] == 0 || extents[d] > std::uint64_t{1} << 32 || box[d] == 0 || box[d] > 256 ||
        element_strides[d] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    m.extents[d] = extents[d];
    m.box[d] = box[d];
  }
  m.address = static_cast<unsigned char*>(address);
  m.row_bytes = strides[0];
  m.swizzle = swizzle;
  *map = {};
  std::memcpy(map, &m, sizeof m);
  return CUDA_SUCCESS;
}
