local defaults = {
  width = 640,
  height = 480,
  title = "untitled",
  sound = { volume = 7, muted = false },
}

-- Copy a table and let the second one override its values.
local function merge(base, extra)
  local result = {}
  for key, value in pairs(base) do
    result[key] = value
  end
  for key, value in pairs(extra) do
    if type(value) == "table" and type(result[key]) == "table" then
      result[key] = merge(result[key], value)
    else
      result[key] = value
    end
  end
  return result
end

local config = merge(defaults, { title = "Pond", sound = { volume = 3 } })
print(config.title, config.width, config.sound.volume)
