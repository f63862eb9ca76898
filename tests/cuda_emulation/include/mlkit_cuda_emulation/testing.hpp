// What tests say to the emulation, and ask it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "runtime.hpp"

namespace cuda_emulation {

/// What a kernel must not do. Thrown by the launch; the text names the kernel, the block and the thread.
class fault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The call of this name returns this code instead of doing anything; the first `after` calls are spared.
void fail_call(std::string_view name, cudaError_t code, int after = 0);
/// Whether such a call is still to come. Forgets it.
bool forget_failing_calls();

/// What is taken and not given back.
struct usage {
  std::size_t allocations = 0, bytes = 0;  // of device memory
  std::size_t streams = 0, events = 0, graphs = 0;
  friend bool operator==(const usage&, const usage&) = default;
};
usage in_use();

/// Of emulated device memory in all.
inline constexpr std::size_t device_memory_bytes = std::size_t{1} << 30;

/// Whether the program tells of each access to memory, so that all faults are found, or only those of the named
/// instructions: compiled with -fsanitize=thread or not.
bool watches_memory();

/// Bytes of device memory that kernels launched by this thread have asked for, each access counted; all of them only
/// where memory is watched.
struct traffic {
  std::uint64_t read = 0, written = 0;
};
traffic device_traffic();

/// In which order blocks, and the threads of a block, take their turns. What a kernel computes must not depend on it.
/// MLKIT_EMULATED_TURNS=backward in the environment begins backward.
enum class turns { forward, backward };
void take_turns(turns order);

}  // namespace cuda_emulation
