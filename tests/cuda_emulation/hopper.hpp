// What a new block forgets.
#pragma once

namespace cuda_emulation {

void begin_block_of_hopper();

}  // namespace cuda_emulation
