// expect: attention: starts of sequences are std::int32_t
#include <mlkit/attention.hpp>

void f() {
#ifdef CORRECT
  const std::vector<std::int32_t> starts{0, 5};
#else
  const std::vector<std::int64_t> starts{0, 5};
#endif
  const mlkit::attention::sequences packed{starts};
  (void)packed;
}
