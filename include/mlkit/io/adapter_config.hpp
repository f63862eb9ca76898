// adapter_config.json, the file that PEFT writes beside an adapter's weights. Needs nlohmann/json.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../core/config.hpp"
#include "../core/error.hpp"
#include "detail/files.hpp"
#include "detail/json_text.hpp"
#include "detail/name_pattern.hpp"

namespace MLKIT_NAMESPACE::io {

/// What adapter_config.json says about LoRA adapters. Names and defaults are PEFT's. What mlkit does not use is kept in
/// `json`, in its order, and is written back.
struct adapter_config {
  index_t r = 8;
  double lora_alpha = 8;
  double lora_dropout = 0;  ///< in [0, 1)
  bool use_rslora = false;  ///< scale alpha / sqrt(r) instead of alpha / r
  bool use_dora = false;
  bool fan_in_fan_out = false;  ///< the base stores its weights as [in, out]
  std::string bias = "none";
  std::vector<std::string> target_modules;  ///< names, or one regular expression if the next is set
  bool target_modules_is_pattern = false;
  std::vector<std::pair<std::string, index_t>>
      rank_pattern;  ///< ranks of modules whose names match; the first match counts
  std::vector<std::pair<std::string, double>> alpha_pattern;       ///< the same for alpha
  nlohmann::ordered_json json = nlohmann::ordered_json::object();  ///< the whole file as it was read
};

namespace detail {

using namespace mlkit::detail;
using json = nlohmann::ordered_json;

// Strict: no key twice in an object, at most 64 levels.
inline json parse_json(std::string_view text, const std::string& source) {
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > 64) fail_io(source, ": JSON nested deeper than 64 levels");
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
      fail_io(source, ": the key ", in_quotes(value.get<std::string>()), " is given twice");
    return true;
  };
  if (!is_utf8(text)) fail_io(source, ": is not JSON: it is not valid UTF-8");
  try {
    return json::parse(text.begin(), text.end(), check);
  } catch (const json::exception& e) {
    fail_io(source, ": is not JSON: ", e.what());
  }
}

// As PEFT and diffusers write it: indented by two, ASCII only.
inline std::string json_text(const json& value, std::string_view function) {
  try {
    return value.dump(2, ' ', true);
  } catch (const json::exception&) {  // the only thing that dump refuses
    fail_value(function, ": a string of the configuration is not valid UTF-8");
  }
}

/// Reads members of a JSON object into variables; a wrong type is an io_error that names the key and both types.
class json_fields {
 public:
  json_fields(const json& object, const std::string& source) : object_(object), source_(source) {}

  void read(const char* key, bool& out) const {
    if (const json* v = find(key)) out = require(*v, key, v->is_boolean(), "a boolean").get<bool>();
  }
  void read(const char* key, std::string& out) const {
    if (const json* v = find(key)) out = require(*v, key, v->is_string(), "a string").get<std::string>();
  }
  void read(const char* key, index_t& out) const {
    if (const json* v = find(key)) out = integer(*v, key);
  }
  void read(const char* key, double& out) const {
    if (const json* v = find(key)) out = number(*v, key);
  }
  template <class T>
  void read(const char* key, std::vector<std::pair<std::string, T>>& out) const {
    const json* v = find(key);
    if (!v || v->is_null()) return;
    for (const auto& [name, value] : require(*v, key, v->is_object(), "an object").items())
      if constexpr (std::is_same_v<T, double>)
        out.emplace_back(name, number(value, name));
      else
        out.emplace_back(name, integer(value, name));
  }

  const json* find(const char* key) const {
    const auto at = object_.find(key);
    return at == object_.end() ? nullptr : &*at;
  }
  bool has_value(const char* key) const {  // there, and neither null, false nor empty
    const json* v = find(key);
    return v && !v->is_null() && *v != json(false) && !(v->is_structured() && v->empty());
  }
  const json& require(const json& value, std::string_view key, bool holds, const char* wanted) const {
    if (!holds) fail_io(source_, ": ", in_quotes(key), " is ", value.type_name(), ", but ", wanted, " was expected");
    return value;
  }

 private:
  index_t integer(const json& v, std::string_view key) const {
    require(v, key, v.is_number_integer(), "an integer");
    if (v.is_number_unsigned() && v.get<std::uint64_t>() > INT64_MAX)
      fail_io(source_, ": ", in_quotes(key), " is too large");
    return v.get<index_t>();
  }
  double number(const json& v, std::string_view key) const {
    return require(v, key, v.is_number(), "a number").get<double>();
  }

  const json& object_;
  const std::string& source_;
};

inline adapter_config config_from(json object, const std::string& source) {
  adapter_config config;
  config.json = std::move(object);
  if (!config.json.is_object()) fail_io(source, ": is ", config.json.type_name(), ", but an object was expected");
  const json_fields fields(config.json, source);
  std::string type = "LORA";
  fields.read("peft_type", type);
  if (type != "LORA") fail_io(source, ": peft_type is ", in_quotes(type), ", but LORA was expected");
  for (const char* key : {"r", "lora_alpha"})
    if (!fields.find(key)) fail_io(source, ": there is no ", in_quotes(key));
  fields.read("r", config.r);
  fields.read("lora_alpha", config.lora_alpha);
  fields.read("lora_dropout", config.lora_dropout);
  fields.read("use_rslora", config.use_rslora);
  fields.read("use_dora", config.use_dora);
  fields.read("fan_in_fan_out", config.fan_in_fan_out);
  fields.read("bias", config.bias);
  fields.read("rank_pattern", config.rank_pattern);
  fields.read("alpha_pattern", config.alpha_pattern);
  if (const json* targets = fields.find("target_modules"); targets && !targets->is_null()) {
    config.target_modules_is_pattern = targets->is_string();
    if (targets->is_string()) {
      config.target_modules.push_back(targets->get<std::string>());
    } else {
      for (const json& name : fields.require(*targets, "target_modules", targets->is_array(), "an array or a string"))
        config.target_modules.push_back(
            fields.require(name, "target_modules", name.is_string(), "an array of strings").get<std::string>());
    }
  }
  const auto positive = [&](std::string_view key, index_t r) {
    if (r <= 0) fail_io(source, ": ", in_quotes(key), " = ", r, ", but a rank is positive");
  };
  positive("r", config.r);
  for (const auto& [key, r] : config.rank_pattern) positive(key, r);
  if (!std::isfinite(config.lora_alpha)) fail_io(source, ": lora_alpha is not finite");
  for (const auto& [key, alpha] : config.alpha_pattern)
    if (!std::isfinite(alpha)) fail_io(source, ": alpha_pattern ", in_quotes(key), " is not finite");
  if (!(config.lora_dropout >= 0 && config.lora_dropout < 1))
    fail_io(source, ": lora_dropout = ", config.lora_dropout, " is outside [0, 1)");
  return config;
}

// Brings config.json up to date with the members.
inline json json_of(const adapter_config& config) {
  json object = config.json.is_object() ? config.json : json::object();
  const auto number = [](double value) {  // PEFT writes 8, not 8.0
    return std::trunc(value) == value && std::abs(value) < 0x1p53 ? json(static_cast<index_t>(value)) : json(value);
  };
  const auto pattern = [&](const auto& entries) {
    json p = json::object();
    for (const auto& [key, value] : entries) p[key] = number(static_cast<double>(value));
    return p;
  };
  const auto set = [&](const char* key, json value) {
    // What has not changed keeps its spelling (8.0 stays 8.0).
    if (const auto at = object.find(key); at == object.end() || *at != value) object[key] = std::move(value);
  };
  set("peft_type", "LORA");
  set("r", config.r);
  set("lora_alpha", number(config.lora_alpha));
  if (!object.contains("lora_dropout") || object["lora_dropout"] != json(config.lora_dropout))
    object["lora_dropout"] = config.lora_dropout;
  set("use_rslora", config.use_rslora);
  set("use_dora", config.use_dora);
  set("fan_in_fan_out", config.fan_in_fan_out);
  set("bias", config.bias);
  set("rank_pattern", pattern(config.rank_pattern));
  set("alpha_pattern", pattern(config.alpha_pattern));
  if (config.target_modules_is_pattern && config.target_modules.size() == 1)
    set("target_modules", config.target_modules[0]);
  else if (!config.target_modules.empty() || !object.contains("target_modules"))
    set("target_modules", config.target_modules);
  return object;
}

// What PEFT can do to an adapter's meaning that the numbers in the file do not show.
inline void refuse_unsupported(const adapter_config& config, const std::string& source) {
  const json_fields fields(config.json, source);
  for (const char* key :
       {"alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora",
        "layer_replication", "lora_bias", "target_parameters", "trainable_token_indices"})
    if (fields.has_value(key)) fail_io(source, ": ", in_quotes(key), " is set, which mlkit does not support");
  if (const json* init = fields.find("init_lora_weights"); init && init->is_string()) {
    const auto how = init->get<std::string>();
    for (const std::string_view prefix : {"pissa", "corda", "olora", "loftq", "lora_ga"})
      if (how.starts_with(prefix))
        fail_io(source, ": init_lora_weights is ", in_quotes(how),
                ", which changes the base's weights; save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion");
  }
}

// The value of the first pattern that matches the module, else the default.
template <class T>
class pattern_table {
 public:
  pattern_table(const std::vector<std::pair<std::string, T>>& entries, T otherwise, const std::string& source)
      : otherwise_(otherwise) {
    for (const auto& [key, value] : entries) patterns_.emplace_back(name_pattern(key, source), value);
  }
  T operator()(std::string_view module) const {
    for (const auto& [pattern, value] : patterns_)
      if (pattern.matches(module)) return value;
    return otherwise_;
  }

 private:
  std::vector<std::pair<name_pattern, T>> patterns_;
  T otherwise_;
};

}  // namespace detail

/// Reads the text of an adapter_config.json. Throws io_error for anything but strict JSON, a wrong type, another
/// peft_type than LORA, a missing or non-positive rank, a missing or non-finite alpha, or a dropout outside [0, 1).
inline adapter_config parse_adapter_config(std::string_view text, const std::string& source = "adapter_config.json") {
  return detail::config_from(detail::parse_json(text, source), source);
}

/// The same from a file.
inline adapter_config read_adapter_config(const std::string& path) {
  const auto image = mlkit::detail::load_file(path, false);
  return parse_adapter_config({reinterpret_cast<const char*>(image->bytes().data()), image->bytes().size()}, path);
}

/// The text that PEFT would write: indented by two, ASCII only, unknown keys kept. Throws value_error for strings that
/// are not UTF-8.
inline std::string adapter_config_text(const adapter_config& config) {
  return detail::json_text(detail::json_of(config), "io::adapter_config_text");
}

}  // namespace MLKIT_NAMESPACE::io
