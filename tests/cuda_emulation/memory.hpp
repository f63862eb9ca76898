// Device memory, as the runtime's calls take it and give it back.
#pragma once

#include <cstddef>

namespace cuda_emulation {

void* take_device_memory(std::size_t bytes);  // null if there is not enough
bool give_device_memory_back(void* p);        // false if it was not taken
void reuse_device_memory(void* p);            // as if given back and taken again
struct memory_in_use {
  std::size_t allocations, bytes;
};
memory_in_use device_memory_in_use();

void pin(void* p);
bool unpin(void* p);
bool is_pinned(const void* p);

}  // namespace cuda_emulation
