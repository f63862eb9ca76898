// Adapters from and to files: what PEFT, diffusers and kohya wrote, as views of the mapped file, and back.
// Needs nlohmann/json (through io); the rest of lora does not.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../io/adapter_file.hpp"
#include "adapter.hpp"

namespace MLKIT_NAMESPACE::lora {

/// The adapters of a file, by module, as T. A value: copies share the mapped file. Tensors that the file stores as T
/// are looked at where they are; others are converted when they are first asked for. Views are good while the set or a
/// copy of it lives; const use from several threads is safe.
template <storage T = float>
class adapter_set {
 public:
  explicit adapter_set(io::adapter_file&& file) : state_(std::make_shared<state>()) { state_->file = std::move(file); }

  /// What the file says about each adapter, by component and module: names, kinds, ranks, alphas.
  const std::vector<io::adapter_entry>& entries() const noexcept { return state_->file.adapters; }
  auto begin() const noexcept { return entries().begin(); }
  auto end() const noexcept { return entries().end(); }
  std::size_t size() const noexcept { return entries().size(); }
  /// The file: its naming, metadata and configurations.
  const io::adapter_file& file() const noexcept { return state_->file; }

  bool contains(std::string_view module) const { return state_->file.find(module) != nullptr; }
  /// What the file says about the module's adapter. Throws io_error if there is none, or if components share the name.
  const io::adapter_entry& entry(std::string_view module) const { return state_->file.at(module); }

  /// The module's adapter, given as "module" or "component.module". A convolution's A is [rank, in * kernel...].
  /// Throws io_error if there is none, and value_error if it is DoRA, which is more than A and B (see halves()).
  adapter_view<T> at(std::string_view module) const {
    const io::adapter_entry& e = entry(module);
    if (e.magnitude)
      detail::fail_value("lora::adapter_set::at: ", mlkit::detail::in_quotes(e.path()),
                         " is a DoRA adapter; take its halves() and its magnitude()");
    return halves(e);
  }

  /// A, B and the scale, also of DoRA adapters.
  adapter_view<T> halves(std::string_view module) const { return halves(entry(module)); }
  adapter_view<T> halves(const io::adapter_entry& e) const {
    return {{elements(e.a), {e.rank(), e.a.count() / e.rank()}}, {elements(e.b), {e.out(), e.rank()}}, e.scale()};
  }

  /// The DoRA magnitude, one for each output. Throws value_error if the adapter has none.
  vector_view<const T> magnitude(std::string_view module) const {
    const io::adapter_entry& e = entry(module);
    if (!e.magnitude)
      detail::fail_value("lora::adapter_set::magnitude: ", mlkit::detail::in_quotes(e.path()), " has none");
    return {elements(*e.magnitude), {e.out()}};
  }

 private:
  struct state {
    io::adapter_file file;
    std::mutex mutex;
    std::map<const std::byte*, vector<T>> converted;  // by where the file has it
  };

  const T* elements(const io::tensor_info& t) const {
    if (t.dtype == io::dtype_of<T>()) return t.elements<T>().data();
    const std::lock_guard lock(state_->mutex);
    const auto [at, is_new] = state_->converted.try_emplace(t.data);
    if (is_new) {
      try {
        vector<T> values({t.count()}, uninitialized);
        t.copy_to(std::span<T>(values.data(), static_cast<std::size_t>(values.size())));
        at->second = std::move(values);
      } catch (...) {
        state_->converted.erase(at);
        throw;
      }
    }
    return at->second.data();
  }

  std::shared_ptr<state> state_;
};

/// Loads the adapters of a file, or of a directory that PEFT or diffusers wrote; all namings of io::adapter_naming are
/// told apart by themselves. The file is mapped and checked whole: a tensor that belongs to no adapter, a missing half,
/// or sizes that contradict each other are io_errors (see io::read_adapters).
template <storage T = float>
adapter_set<T> load_adapters(const std::string& path, const io::adapter_read_options& options = {}) {
  return adapter_set<T>(io::read_adapters(path, options));
}

/// What an adapter's halves do not say about it.
template <storage T>
struct file_entry_options {
  std::string component = {};           ///< "unet", "text_encoder", ...; files of PEFT have none
  vector_view<const T> magnitude = {};  ///< DoRA: one for each output
  std::vector<index_t> kernel = {};     ///< extents of a convolution's kernel; a is then [rank, in * kernel...]
  bool embedding = false;
};

/// An adapter for save_adapters. It looks at the halves, which must stay until the file is written.
/// Throws shape_error if a's columns are no multiple of the kernel's size.
template <storage T>
io::adapter_entry file_entry(std::string module, const adapter_view<T>& p, const file_entry_options<T>& options = {}) {
  constexpr std::string_view function = "lora::file_entry";
  detail::check_adapter(function, p, module);
  io::adapter_entry e;
  e.module = std::move(module);
  e.component = options.component;
  e.kind = options.embedding        ? io::adapter_kind::embedding
           : options.kernel.empty() ? io::adapter_kind::linear
                                    : io::adapter_kind::convolution;
  e.a = io::named(e.module + ".a", p.a);
  e.b = io::named(e.module + ".b", p.b);
  e.alpha = p.scale * static_cast<double>(p.rank());
  if (!options.kernel.empty()) {
    index_t size = 1;
    for (const index_t k : options.kernel) size *= k;
    if (options.embedding || size < 1 || p.inputs() % size != 0)
      detail::fail_shape(function, ": ", e.module, ".a has ", p.inputs(), " columns, but the kernel ",
                         io::detail::shape_text(options.kernel), " has ", size, " elements");
    e.a.shape = {p.rank(), p.inputs() / size};
    e.a.shape.insert(e.a.shape.end(), options.kernel.begin(), options.kernel.end());
    e.b.shape.resize(e.a.shape.size(), 1);
  }
  if (options.magnitude.data) e.magnitude = io::named(e.module + ".magnitude", options.magnitude);
  return e;
}

/// The same for an adapter that owns its halves; its alpha and its rsLoRA scaling are kept apart.
template <storage T>
io::adapter_entry file_entry(std::string module, const adapter<T>& p, const file_entry_options<T>& options = {}) {
  io::adapter_entry e = file_entry(std::move(module), as_adapter(p), options);
  e.alpha = p.alpha;
  e.rslora = p.rs;
  return e;
}

/// Writes adapters under the names of PEFT (the default), diffusers or kohya; see io::write_adapters.
inline void save_adapters(const std::string& path, const std::vector<io::adapter_entry>& adapters,
                          const io::adapter_write_options& options = {}) {
  io::write_adapters(path, adapters, options);
}

/// Writes a loaded set again, under the same or other names.
template <storage T>
void save_adapters(const std::string& path, const adapter_set<T>& set, const io::adapter_write_options& options = {}) {
  io::write_adapters(path, set.entries(), options);
}

}  // namespace MLKIT_NAMESPACE::lora
