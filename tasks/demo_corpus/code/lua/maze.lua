local maze = {
  "#########",
  "#S  #   #",
  "# # # # #",
  "# #   #E#",
  "#########",
}

local function at(x, y)
  return maze[y]:sub(x, x)
end

-- Depth first search; returns the number of steps or nil.
local function walk(x, y, seen, steps)
  local key = x .. ":" .. y
  if seen[key] or at(x, y) == "#" then return nil end
  if at(x, y) == "E" then return steps end
  seen[key] = true
  return walk(x + 1, y, seen, steps + 1) or walk(x, y + 1, seen, steps + 1)
    or walk(x - 1, y, seen, steps + 1) or walk(x, y - 1, seen, steps + 1)
end

print(walk(2, 2, {}, 0))
