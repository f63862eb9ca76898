// expect: no matching function
#include <mlkit/rl.hpp>

#ifdef CORRECT
using type = bool;
#else
using type = float;  // 0 * NaN is NaN: what does not count is selected away, never multiplied
#endif

void f(mlkit::matrix<float>& advantages, const type* kept) {
  mlkit::rl::whiten(mlkit::cpu{}, advantages, mlkit::matrix_view<const type>(kept, {5, 5}));
}
