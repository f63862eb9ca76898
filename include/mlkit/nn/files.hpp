// Parameters and adapters in safetensors files. Apart from nn.hpp, since adapter files need nlohmann/json.
#pragma once

#include "../io/adapter_file.hpp"
#include "linear.hpp"

namespace MLKIT_NAMESPACE::nn {

/// Writes every parameter under its own name and with its shape. Throws io_error where the system refuses; the file
/// appears whole or not at all.
template <real T>
void save(const std::string& path, const parameters<T>& store) {
  std::vector<io::tensor_info> tensors;
  for (const parameter<T>& p : store) {
    io::tensor_info t = io::named(p.name, p.value);
    t.shape.clear();
    for (int d = 0; d < p.shape.rank(); ++d) t.shape.push_back(p.shape[d]);
    tensors.push_back(std::move(t));
  }
  io::write_safetensors(path, tensors);
}

/// Reads what save wrote into parameters that exist. Throws io_error before anything is changed if the file holds
/// another name or shape, lacks one, or holds numbers that are no floating-point ones.
template <real T>
void load(const std::string& path, parameters<T>& store) {
  const io::safetensors file = io::safetensors::open(path);
  if (static_cast<index_t>(file.size()) != store.count())
    throw io_error(path + " holds " + std::to_string(file.size()) + " tensors, but the model has " +
                   std::to_string(store.count()) + " parameters");
  for (const parameter<T>& p : store) {
    const io::tensor_info& t = file.at(p.name);
    const auto rank = static_cast<std::size_t>(p.shape.rank());
    bool equal = t.shape.size() == rank;
    for (std::size_t d = 0; equal && d < rank; ++d) equal = t.shape[d] == p.shape[static_cast<int>(d)];
    if (!equal)
      throw io_error(t.describe() + " has shape " + io::detail::shape_text(t.shape) + ", but the model has " +
                     p.shape.text());
    if (!io::detail::with_float_loader(t.dtype, [](std::size_t, auto) {}))
      throw io_error(t.describe() + " has dtype " + std::string(io::name_of(t.dtype)) +
                     ", but a floating-point dtype was asked for");
  }
  for (parameter<T>& p : store)
    file.at(p.name).copy_to(std::span<T>(p.value.data(), static_cast<std::size_t>(p.size())));
}

/// Writes the adapters of a model's linear layers, by default as PEFT does: a directory, or a .safetensors file, with
/// adapter_config.json beside it. Throws value_error if no layer has one.
template <real T, adaptable<T> M>
void save_adapters(const std::string& path, M& model, const io::adapter_write_options& o = {}) {
  std::vector<io::adapter_entry> entries;
  model.each_linear([&](const linear_layer<T>& layer) {
    const auto* a = layer.adapted();
    if (!a) return;
    io::adapter_entry e;
    e.module = layer.path();
    e.a = io::named("a", a->down->matrix());
    e.b = io::named("b", a->up->matrix());
    if (a->magnitude) e.magnitude = io::named("magnitude", a->magnitude->value);
    e.alpha = a->options.alpha;
    e.rslora = a->options.rs;
    entries.push_back(std::move(e));
  });
  io::write_adapters(path, entries, o);
}

/// Reads adapters and puts each beside the linear layer that it names. Throws, before any layer is changed, io_error if
/// the file names a layer that the model lacks, shape_error if one does not fit or adapts no linear map, and
/// value_error if the store holds an adapter of a layer already.
template <real T, adaptable<T> M>
void load_adapters(const std::string& path, M& model, parameters<T>& store) {
  const io::adapter_file file = io::read_adapters(path);
  std::vector<std::string> known;
  model.each_linear([&](const linear_layer<T>& layer) {
    known.push_back(layer.path());
    const io::adapter_entry* e = file.find(layer.path());
    if (!e) return;
    if (e->kind != io::adapter_kind::linear)
      detail::fail_shape(path, ": the adapter of ", layer.path(), " is for ",
                         e->kind == io::adapter_kind::embedding ? "an embedding" : "a convolution",
                         ", but the layer is linear");
    if (e->in() != layer.inputs() || e->out() != layer.outputs())
      detail::fail_shape(path, ": the adapter of ", layer.path(), " is for [", e->out(), ", ", e->in(),
                         "], but the layer is [", layer.outputs(), ", ", layer.inputs(), "]");
    for (const char* part : {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"})
      if (const std::string name = layer.path().empty() ? part : layer.path() + "." + part; store.contains(name))
        detail::fail_value("nn::load_adapters: the store has a parameter ", name, " already");
  });
  for (const io::adapter_entry& e : file.adapters)
    if (std::none_of(known.begin(), known.end(), [&](const std::string& name) { return file.find(name) == &e; }))
      throw io_error(path + ": the model has no linear layer " + e.module);
  model.each_linear([&](linear_layer<T>& layer) {
    const io::adapter_entry* e = file.find(layer.path());
    if (!e) return;
    layer.adapt(store, {.rank = e->rank(),
                        .alpha = e->alpha.value_or(static_cast<double>(e->rank())),
                        .rs = e->rslora,
                        .dora = e->magnitude.has_value()});
    const auto fill = [](const io::tensor_info& t, parameter<T>& p) {
      t.copy_to(std::span<T>(p.value.data(), static_cast<std::size_t>(p.size())));
    };
    fill(e->a, *layer.adapted()->down);
    fill(e->b, *layer.adapted()->up);
    if (e->magnitude) fill(*e->magnitude, *layer.adapted()->magnitude);
  });
}

}  // namespace MLKIT_NAMESPACE::nn
