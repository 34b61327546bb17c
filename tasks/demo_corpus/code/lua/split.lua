local function split(text, separator)
  local parts = {}
  local start = 1
  while true do
    -- Plain search, so that "." or "%" are ordinary characters.
    local from, to = string.find(text, separator, start, true)
    if not from then
      break
    end
    parts[#parts + 1] = string.sub(text, start, from - 1)
    start = to + 1
  end
  parts[#parts + 1] = string.sub(text, start)
  return parts
end

for i, part in ipairs(split("red, green,, blue", ",")) do
  print(i, "[" .. part .. "]")
end
