// Files as bytes: mapped or read, and replaced as a whole.
#pragma once

#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>

#include "../../core/config.hpp"
#include "../../core/error.hpp"
#include "../../core/memory.hpp"
#include "json_text.hpp"

#if defined(__unix__) || defined(__APPLE__)
#define MLKIT_POSIX_FILES 1
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#else
#define MLKIT_POSIX_FILES 0
#include <cstdio>
#include <filesystem>
#include <fstream>
#endif

namespace MLKIT_NAMESPACE::detail {

/// Bytes that stay where they are for as long as somebody shares them: a mapped file, memory of its own, or the user's.
class byte_image {
 public:
  explicit byte_image(std::span<const std::byte> borrowed) noexcept : bytes_(borrowed) {}
  byte_image(aligned_ptr<std::byte> owned, std::size_t size) noexcept
      : bytes_(owned.get(), size), owned_(std::move(owned)) {}
  byte_image(const byte_image&) = delete;
  byte_image& operator=(const byte_image&) = delete;

#if MLKIT_POSIX_FILES
  struct mapped_tag {};
  byte_image(mapped_tag, void* mapping, std::size_t size) noexcept
      : bytes_(static_cast<const std::byte*>(mapping), size), mapping_(mapping) {}
  ~byte_image() {
    if (mapping_) munmap(mapping_, bytes_.size());
  }
#endif

  std::span<const std::byte> bytes() const noexcept { return bytes_; }

  /// The same bytes at an address that suits any element type: in place where it does, else a copy that is made once.
  const std::byte* aligned(const std::byte* data, std::size_t size, std::size_t alignment) const {
    if (size == 0 || reinterpret_cast<std::uintptr_t>(data) % alignment == 0) return data;
    const std::lock_guard lock(mutex_);
    aligned_ptr<std::byte>& copy = copies_[{data, size}];
    if (!copy) {
      copy = make_aligned<std::byte>(static_cast<index_t>(size));
      std::memcpy(copy.get(), data, size);
    }
    return copy.get();
  }

 private:
  std::span<const std::byte> bytes_;
  aligned_ptr<std::byte> owned_;
#if MLKIT_POSIX_FILES
  void* mapping_ = nullptr;
#endif
  mutable std::mutex mutex_;
  mutable std::map<std::pair<const std::byte*, std::size_t>, aligned_ptr<std::byte>> copies_;
};

#if MLKIT_POSIX_FILES

[[noreturn]] inline void fail_system(const std::string& path, std::string_view what, int code) {
  fail_io(path, ": ", what, ": ", std::strerror(code));
}

/// A file descriptor that closes itself.
class descriptor {
 public:
  explicit descriptor(int fd) noexcept : fd_(fd) {}
  descriptor(const descriptor&) = delete;
  descriptor& operator=(const descriptor&) = delete;
  ~descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const noexcept { return fd_; }
  int close() noexcept { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

/// The whole file, mapped, or read into memory of its own.
inline std::shared_ptr<const byte_image> load_file(const std::string& path, bool map) {
  const descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));  // a pipe must not block
  if (file.get() < 0) fail_system(path, "cannot open", errno);
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) fail_system(path, "cannot inspect", errno);
  if (!S_ISREG(status.st_mode)) fail_io(path, ": is not a regular file");
  const auto size = static_cast<std::size_t>(status.st_size);
  if (map && size > 0) {
    void* mapping = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (mapping == MAP_FAILED) fail_system(path, "cannot map", errno);
    return std::make_shared<const byte_image>(byte_image::mapped_tag{}, mapping, size);
  }
  auto memory = make_aligned<std::byte>(static_cast<index_t>(size));
  for (std::size_t done = 0; done < size;) {
    const ssize_t n = ::read(file.get(), memory.get() + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_system(path, "cannot read", errno);
    if (n == 0) fail_io(path, ": has ", size, " bytes, but reading ended at ", done);
    done += static_cast<std::size_t>(n);
  }
  return std::make_shared<const byte_image>(std::move(memory), size);
}

/// A file that takes the place of `path` as a whole or not at all. What is written goes to a temporary name beside it;
/// commit() puts that in place after it has reached the disk. Without a commit the temporary file is removed.
class file_replacement {
 public:
  explicit file_replacement(const std::string& path) : path_(resolve(path)) {
    struct stat status {};
    const bool exists = ::stat(path_.c_str(), &status) == 0;
    if (exists && !S_ISREG(status.st_mode)) fail_io(path, ": is not a regular file");
    static std::atomic<unsigned> counter{0};
    const std::size_t slash = path_.rfind('/');
    directory_ = slash == std::string::npos ? "." : slash == 0 ? "/" : path_.substr(0, slash);
    const std::string name = slash == std::string::npos ? path_ : path_.substr(slash + 1);
    if (name.empty()) fail_io(path, ": names no file");
    for (int attempt = 0; file_ < 0; ++attempt) {
      // Cut, so that the name stays within what file systems take (255 bytes).
      temporary_ = directory_ + "/." + name.substr(0, 200) + "." + std::to_string(::getpid()) + "." +
                   std::to_string(counter.fetch_add(1)) + ".tmp";
      file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (file_ < 0 && (errno != EEXIST || attempt == 1000)) fail_system(temporary_, "cannot create", errno);
    }
    if (exists) (void)::fchmod(file_, status.st_mode & 0777);
  }
  file_replacement(const file_replacement&) = delete;
  file_replacement& operator=(const file_replacement&) = delete;
  ~file_replacement() {
    if (file_ >= 0) ::close(file_);
    if (!committed_) ::unlink(temporary_.c_str());
  }

  void write(const void* data, std::size_t size) {
    const auto* at = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t n = ::write(file_, at, size < (std::size_t{1} << 30) ? size : std::size_t{1} << 30);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail_system(path_, "cannot write", errno);
      at += n;
      size -= static_cast<std::size_t>(n);
    }
  }

  void commit() {
    if (::fsync(file_) != 0) fail_system(path_, "cannot flush", errno);
    if (::close(std::exchange(file_, -1)) != 0) fail_system(path_, "cannot close", errno);
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_system(path_, "cannot rename", errno);
    committed_ = true;
    const descriptor folder(::open(directory_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECTORY));
    // Some file systems cannot flush a directory; the file itself is whole in any case.
    if (folder.get() >= 0) (void)::fsync(folder.get());
  }

 private:
  // A symbolic link keeps pointing where it does; its target is what is replaced.
  static std::string resolve(const std::string& path) {
    struct stat status {};
    if (::lstat(path.c_str(), &status) != 0 || !S_ISLNK(status.st_mode)) return path;
    const std::unique_ptr<char, aligned_free> real(::realpath(path.c_str(), nullptr));
    if (!real) fail_system(path, "cannot follow the link", errno);
    return real.get();
  }

  std::string path_, directory_, temporary_;
  int file_ = -1;
  bool committed_ = false;
};

#else

inline std::shared_ptr<const byte_image> load_file(const std::string& path, bool) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) fail_io(path, ": cannot open");
  const std::streamoff size = file.tellg();
  if (size < 0) fail_io(path, ": cannot read");
  auto memory = make_aligned<std::byte>(size);
  file.seekg(0);
  if (size > 0 && !file.read(reinterpret_cast<char*>(memory.get()), size)) fail_io(path, ": cannot read");
  return std::make_shared<const byte_image>(std::move(memory), static_cast<std::size_t>(size));
}

class file_replacement {
 public:
  explicit file_replacement(const std::string& path) : path_(path), temporary_(path + ".tmp") {
    if (std::filesystem::exists(path) && !std::filesystem::is_regular_file(path))
      fail_io(path, ": is not a regular file");
    file_.open(temporary_, std::ios::binary | std::ios::trunc);
    if (!file_) fail_io(temporary_, ": cannot create");
  }
  file_replacement(const file_replacement&) = delete;
  file_replacement& operator=(const file_replacement&) = delete;
  ~file_replacement() {
    file_.close();
    if (!committed_) std::remove(temporary_.c_str());
  }

  void write(const void* data, std::size_t size) {
    if (!file_.write(static_cast<const char*>(data), static_cast<std::streamsize>(size)))
      fail_io(path_, ": cannot write");
  }

  void commit() {
    file_.close();
    if (!file_) fail_io(path_, ": cannot close");
    std::error_code code;
    std::filesystem::rename(temporary_, path_, code);
    if (code) fail_io(path_, ": cannot rename: ", code.message());
    committed_ = true;
  }

 private:
  std::string path_, temporary_;
  std::ofstream file_;
  bool committed_ = false;
};

#endif

}  // namespace MLKIT_NAMESPACE::detail
