#include "peers.hpp"

namespace bench::peers {

const std::vector<peer>& all() {
  static const std::vector<peer> peers {
#if BENCH_EIGEN
    eigen(),
#endif
#if BENCH_OPENBLAS
        openblas(),
#endif
#if BENCH_ONEDNN
        onednn(),
#endif
  };
  return peers;
}

}  // namespace bench::peers
