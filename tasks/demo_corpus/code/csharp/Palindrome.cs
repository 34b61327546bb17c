using System;
using System.Linq;

namespace Demo.Text
{
    public static class Palindrome
    {
        /// <summary>Ignores case, spaces and punctuation.</summary>
        public static bool Check(string text)
        {
            var letters = text.Where(char.IsLetter).Select(char.ToLowerInvariant).ToArray();
            for (int i = 0, j = letters.Length - 1; i < j; i++, j--)
            {
                if (letters[i] != letters[j])
                {
                    return false;
                }
            }
            return true;
        }
    }
}
