// CRC-32 as zlib computes it (reflected polynomial 0xEDB88320, started and ended with all bits flipped).
#pragma once

#include <cstddef>
#include <cstdint>

namespace moert {

uint32_t crc32(const uint8_t* data, size_t size);

}  // namespace moert
