// expect: attention: a boolean_mask is a view of bool, std::uint8_t or char
#include <mlkit/attention.hpp>

#ifdef CORRECT
using type = bool;
#else
using type = float;  // a bias of 0 and -inf is a bias
#endif

void f(const type* mask) {
  const mlkit::attention::boolean_mask stage{mlkit::matrix_view<const type>(mask, {5, 5})};
  (void)stage;
}
