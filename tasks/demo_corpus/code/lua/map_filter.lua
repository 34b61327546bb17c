local M = {}

function M.map(list, fn)
  local out = {}
  for i = 1, #list do
    out[i] = fn(list[i])
  end
  return out
end

function M.filter(list, keep)
  local out = {}
  for i = 1, #list do
    if keep(list[i]) then
      out[#out + 1] = list[i]
    end
  end
  return out
end

function M.reduce(list, fn, initial)
  local result = initial
  for i = 1, #list do
    result = fn(result, list[i])
  end
  return result
end

function M.sum(list)
  return M.reduce(list, function(a, b) return a + b end, 0)
end

return M
