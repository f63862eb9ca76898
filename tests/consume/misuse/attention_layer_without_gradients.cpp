// expect: lora: a projection with an adapter has gradients
#include <mlkit/attention.hpp>
#include <mlkit/lora.hpp>

void f(mlkit::tensor<float, 3>& x, mlkit::matrix<float>& w, const mlkit::lora::adapter<float>& adapter,
       const mlkit::attention::kept<float>& kept, const mlkit::lora::gradients<float>& g, mlkit::tensor<float, 3>& dx) {
  namespace attention = mlkit::attention;
  namespace lora = mlkit::lora;
  const lora::projection p{lora::dense{w}, adapter};
  const attention::self layer{p, p, p, p, {.heads = 2}};
#ifdef CORRECT
  const attention::layer_gradients grads{g, g, g, g};
#else
  const attention::layer_gradients grads{g, g, lora::no_gradients{}, g};
#endif
  layer.backward(mlkit::cpu{}, x, attention::scores<>{}, kept, x, grads, dx);
}
