// The program's symbol table: the names of kernels, and where variables in shared memory lie.
#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "internal.hpp"

namespace cuda_emulation {
namespace {

struct function {
  std::uintptr_t begin;
  const char* name;
  bool is_kernel;
};

struct program {
  std::vector<char> strings;
  std::vector<shared_variable> shared;
  std::vector<function> functions;  // by address

  program() {
    std::FILE* file = std::fopen("/proc/self/exe", "rb");
    if (!file) return;
    const auto read = [&](auto* to, std::size_t count, std::size_t offset) {
      return std::fseek(file, static_cast<long>(offset), SEEK_SET) == 0 &&
             std::fread(to, sizeof *to, count, file) == count;
    };
    ElfW(Ehdr) header;
    std::vector<ElfW(Shdr)> sections;
    std::vector<ElfW(Sym)> symbols;
    bool good = read(&header, 1, 0);
    if (good) {
      sections.resize(header.e_shnum);
      good = read(sections.data(), sections.size(), header.e_shoff);
    }
    for (std::size_t i = 0; good && i < sections.size(); ++i) {
      const auto& table = sections[i];
      if (table.sh_type != SHT_SYMTAB || table.sh_link >= sections.size()) continue;
      symbols.resize(table.sh_size / sizeof(ElfW(Sym)));
      strings.resize(sections[table.sh_link].sh_size + 1);
      good = read(symbols.data(), symbols.size(), table.sh_offset) &&
             read(strings.data(), strings.size() - 1, sections[table.sh_link].sh_offset);
    }
    std::fclose(file);
    if (!good) return;
    for (const auto& symbol : symbols) {
      const char* name = strings.data() + std::min<std::size_t>(symbol.st_name, strings.size() - 1);
      if (symbol.st_shndx == SHN_UNDEF || symbol.st_size == 0) continue;
      const int type = ELF64_ST_TYPE(symbol.st_info);
      if (type == STT_FUNC)
        functions.push_back({symbol.st_value, name, ELF64_ST_VISIBILITY(symbol.st_other) == STV_PROTECTED});
      // Of the thread-local variables, those inside of functions: only such are declared __shared__.
      if (type == STT_TLS && std::strncmp(name, "_ZZ", 3) == 0)
        shared.push_back({symbol.st_value, symbol.st_size, name});
    }
    std::sort(functions.begin(), functions.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
    std::sort(shared.begin(), shared.end(), [](auto& a, auto& b) { return a.offset < b.offset; });
  }
};

const program& the_program() {
  static const program p;
  return p;
}

struct layout {
  std::uintptr_t base = 0;
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> constant;
};

// Calls with the program itself, which comes first.
template <class F>
void visit_program(F f) {
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* data) {
        (*static_cast<F*>(data))(*info);
        return 1;
      },
      &f);
}

const layout& the_layout() {
  static const layout all = [] {
    layout l;
    visit_program([&](const dl_phdr_info& info) {
      l.base = info.dlpi_addr;
      for (int i = 0; i < info.dlpi_phnum; ++i) {
        const auto& part = info.dlpi_phdr[i];
        if ((part.p_type == PT_LOAD && !(part.p_flags & PF_W)) || part.p_type == PT_GNU_RELRO)
          l.constant.emplace_back(l.base + part.p_vaddr, l.base + part.p_vaddr + part.p_memsz);
      }
    });
    return l;
  }();
  return all;
}

}  // namespace

const std::vector<shared_variable>& shared_variables() { return the_program().shared; }

local_block thread_local_block() {
  local_block block{};
  visit_program([&](const dl_phdr_info& info) {
    for (int i = 0; i < info.dlpi_phnum; ++i)
      if (info.dlpi_phdr[i].p_type == PT_TLS)
        block = {reinterpret_cast<std::uintptr_t>(info.dlpi_tls_data), info.dlpi_phdr[i].p_memsz};
  });
  return block;
}

bool is_constant(std::uintptr_t address) {
  for (const auto& [begin, end] : the_layout().constant)
    if (address >= begin && address < end) return true;
  return false;
}

std::string demangled(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string s = text ? text : name;
  std::free(text);
  return s;
}

namespace {

const function* find_function(const void* address) {
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(address) - the_layout().base;
  const auto& all = the_program().functions;
  const auto at = std::lower_bound(all.begin(), all.end(), begin,
                                   [](const auto& f, std::uintptr_t value) { return f.begin < value; });
  return at != all.end() && at->begin == begin ? &*at : nullptr;
}

void claim(const function& kernel, std::vector<const void*>& kernels) {
  const auto& variables = shared_variables();
  // A variable x of f, whose name is _Z1fv, is called _ZZ1fvE1x.
  const std::string begins = std::string("_Z") + (kernel.name + 1) + "E";
  for (std::size_t i = 0; i < variables.size(); ++i)
    if (std::strncmp(variables[i].name, begins.c_str(), begins.size()) == 0)
      kernels[i] = reinterpret_cast<const void*>(kernel.begin + the_layout().base);
}

}  // namespace

std::vector<const void*> kernels_of_variables() {
  std::vector<const void*> kernels(shared_variables().size());
  for (const auto& f : the_program().functions)
    if (f.is_kernel) claim(f, kernels);
  return kernels;
}

void claim_variables(const void* kernel, std::vector<const void*>& kernels) {
  if (const function* f = find_function(kernel); f && !f->is_kernel) claim(*f, kernels);
}

std::string function_name(const void* function) {
  if (const auto* found = find_function(function)) return demangled(found->name);
  char text[32];
  std::snprintf(text, sizeof text, "at %p", function);
  return text;
}

}  // namespace cuda_emulation
