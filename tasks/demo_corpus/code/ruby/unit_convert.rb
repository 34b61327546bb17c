FACTORS = {
  'mm' => 0.001,
  'cm' => 0.01,
  'm' => 1.0,
  'km' => 1000.0,
  'mile' => 1609.344
}.freeze

def convert(amount, from:, to:)
  amount * FACTORS.fetch(from) / FACTORS.fetch(to)
rescue KeyError => e
  abort "unknown unit: #{e.key}"
end

[
  [5, 'km', 'mile'],
  [180, 'cm', 'm'],
  [2.5, 'm', 'mm']
].each do |amount, from, to|
  result = convert(amount, from: from, to: to)
  puts "#{amount} #{from} = #{result.round(2)} #{to}"
end
