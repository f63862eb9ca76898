// What a new block forgets.
#pragma once

#include <memory>

namespace cuda_emulation {

void begin_block_of_hopper();
/// Takes what is known of the block that has its turn, and gives what `kept` has; the same again brings it back.
void exchange_block_of_hopper(std::shared_ptr<void>& kept);

}  // namespace cuda_emulation
