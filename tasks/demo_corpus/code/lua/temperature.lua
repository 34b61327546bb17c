local scales = {
  C = { to = function(k) return k - 273.15 end, from = function(c) return c + 273.15 end },
  F = {
    to = function(k) return k * 9 / 5 - 459.67 end,
    from = function(f) return (f + 459.67) * 5 / 9 end,
  },
}

-- Every conversion goes through kelvin.
local function convert(value, from, to)
  return scales[to].to(scales[from].from(value))
end

for _, celsius in ipairs({ -10, 0, 20, 37 }) do
  print(string.format("%4d C is %6.1f F", celsius, convert(celsius, "C", "F")))
end
