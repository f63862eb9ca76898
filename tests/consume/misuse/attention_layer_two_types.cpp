// expect: attention: x and context have one type of elements
#include <mlkit/attention.hpp>
#include <mlkit/lora.hpp>

void f(mlkit::tensor<float, 3>& x, mlkit::tensor<mlkit::bf16, 3>& half, mlkit::matrix<float>& w,
       mlkit::tensor<float, 3>& y) {
  const mlkit::lora::projection p{mlkit::lora::dense{w}};
  const mlkit::attention::cross layer{p, p, p, p, {.heads = 2}};
#ifdef CORRECT
  layer.forward(mlkit::cpu{}, x, x, y);
#else
  layer.forward(mlkit::cpu{}, x, half, y);
#endif
  (void)half;
}
