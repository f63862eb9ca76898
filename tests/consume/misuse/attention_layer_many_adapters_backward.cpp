// expect: attention: backward needs a member `backward` of each of the layer's projections
#include <mlkit/attention.hpp>
#include <mlkit/lora.hpp>

void f(mlkit::tensor<float, 3>& x, mlkit::matrix<float>& w, const mlkit::attention::kept<float>& kept,
       mlkit::tensor<float, 3>& dx) {
  namespace attention = mlkit::attention;
  namespace lora = mlkit::lora;
  const std::vector<lora::adapter_view<float>> adapters;
  const std::vector<int> ids(8, -1);
  const lora::projection plain{lora::dense{w}};
#ifdef CORRECT
  const attention::self layer{plain, plain, plain, plain, {.heads = 2}};
#else
  const attention::self layer{
      plain, lora::projection{lora::dense{w}, lora::per_row{adapters, ids}}, plain, plain, {.heads = 2}};
#endif
  constexpr lora::no_gradients none;
  layer.backward(mlkit::cpu{}, x, attention::scores<>{}, kept, x, attention::layer_gradients{none, none, none, none},
                 dx);
}
