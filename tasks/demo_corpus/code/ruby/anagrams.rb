# Finds groups of words that are made of the same letters.
def anagrams(words)
  words
    .group_by { |word| word.downcase.chars.sort.join }
    .values
    .select { |group| group.size > 1 }
end

words = %w[stone notes pan garden danger nap onset lamp]

anagrams(words).each_with_index do |group, index|
  puts "#{index + 1}. #{group.join(' / ')}"
end

longest = anagrams(words).max_by(&:size)
puts "The biggest group has #{longest.size} words."
