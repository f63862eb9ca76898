// expect: attention: a layer's q, k, v and out are each an attention::projection
#include <mlkit/attention.hpp>
#include <mlkit/lora.hpp>

void f(mlkit::tensor<float, 3>& x, mlkit::matrix<float>& w, mlkit::tensor<float, 3>& y) {
  namespace attention = mlkit::attention;
#ifdef CORRECT
  const mlkit::lora::projection p{mlkit::lora::dense{w}};
#else
  const mlkit::matrix_view<const float> p = w.view();
#endif
  const attention::self layer{p, p, p, p, {.heads = 2}};
  layer.forward(mlkit::cpu{}, x, y);
}
